// Callees and callers for the tests of unwinding, as compiled code has them.
#include <exception>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <stdexcept>
#include <string>
#include <unwind.h>
#include <xmmintrin.h>

extern "C" {

void (*append)(void *, const char *, size_t);
int alive;         // objects of this type
sigjmp_buf out;    // where `jump` goes
unsigned modes;    // MXCSR that `Witness` found
int witnessed;     // destructors of it that ran
int finalised;     // digits of what ran at the exit

struct Thrown {
    Thrown() { alive++; }
    Thrown(const Thrown &) { alive++; }
    ~Thrown() { alive--; }
};

static void cleanup(_Unwind_Reason_Code, _Unwind_Exception *e) {
    alive--;
    delete e;
}

// The first byte of the input says what to do.
int callee(void *handle, const char *input, size_t len) {
    Thrown local;
    append(handle, input, len);
    switch (*input) {
    case 't': throw Thrown();
    case 'm': _mm_setcsr(_mm_getcsr() | 0x8000); throw std::runtime_error("thrown");
    case 'f': {
        auto e = new _Unwind_Exception();
        alive++;
        e->exception_class = 0x4e47524654000000;
        e->exception_cleanup = cleanup;
        _Unwind_RaiseException(e);
        return 5;
    }
    case 'p': pthread_exit(nullptr);
    case 'j': alive--; siglongjmp(out, 1);
    case 'e': return 3;
    }
    return 0;
}

typedef int (*invoke)(void *, const char *, const char *, size_t, const char **, size_t *);

// 77 if the callee jumped out.
int left_by_jump(invoke call, const char *name) {
    const char *output;
    size_t len;
    if (sigsetjmp(out, 1)) return 77;
    return call(nullptr, name, "jump", 4, &output, &len);
}

invoke nested;           // a site in the callee
const char *nested_name; // another callee

// Calls another callee, which jumps out of it.
int outer(void *, const char *input, size_t) {
    if (left_by_jump(nested, nested_name) != 77) return 9;
    if (*input == 't') throw 1;
    return 0;
}

// The worker's own routine; the first byte of the input says what it does.
int own_routine(void *, const char *, const char *input, size_t len, const char **output,
                size_t *output_len) {
    Thrown local;
    *output = nullptr;
    *output_len = 0;
    switch (*input) {
    case 't': throw Thrown();
    case 'p': pthread_exit(nullptr);
    case 'e': return -1;
    }
    *output = input;
    *output_len = len + 1;
    return 0;
}

// 55 if the call throws.
int catches(invoke call, const char *name, const char *input) {
    const char *output;
    size_t len;
    try {
        return call(nullptr, name, input, strlen(input), &output, &len);
    } catch (const Thrown &) {
        return 55;
    }
}

struct Witness {
    ~Witness() { modes = _mm_getcsr(); witnessed++; }
};

struct Thread {
    invoke call;
    const char *name;
    void (*bind)();
};

void *thread_main(void *p) {
    Thread &thread = *static_cast<Thread *>(p);
    thread.bind();
    Witness witness;
    const char *output;
    size_t len;
    _mm_setcsr(_mm_getcsr() | 0x40); // denormals are zero
    thread.call(nullptr, thread.name, "pthread_exit", 12, &output, &len);
    return p;
}

void throwing_constructor(int, char **, char **) { throw std::string("no"); }
void exiting_constructor(int, char **, char **) { pthread_exit(nullptr); }
int throwing_create(void *, void *, void *, void **) { throw 7; }

// What generated code in the tests calls.
void thrower(void) { throw Thrown(); }

// What a guarded callee can do wrong, by the first byte of its input.
static volatile int zero;
static char *volatile nowhere;
static void (*volatile target)();
void ***recovery; // where the bridge keeps its stack pointer

static int compare(const void *, const void *) { return *nowhere; }

__attribute__((noinline)) static int deeper(const volatile char *above) {
    volatile char frame[512];
    frame[0] = above[0];
    return deeper(frame) + frame[0];
}

static void *in_a_thread(void *) {
    *nowhere = 1;
    return nullptr;
}

struct Crashes {
    ~Crashes() { *nowhere = 1; }
};

// Whether this thread catches or throws anything.
int exceptions() { return (std::current_exception() != nullptr) + 2 * std::uncaught_exceptions(); }

// Its frame is known by rbp alone, and that is gone.
__attribute__((noinline)) static int loses_its_frame(size_t len) {
    volatile char *room = (volatile char *)__builtin_alloca(len + 16);
    room[0] = 0;
    asm volatile("mov $0x10, %%ebp; ud2" ::: "memory");
    return room[0];
}

int crashing(void *handle, const char *input, size_t len) {
    append(handle, input, len);
    switch (*input) {
    case '0': *nowhere = 1; break;
    case 'd': return 5 / zero;
    case 'u': __builtin_trap();
    case 'b': {
        int fd = memfd_create("b", 0);
        auto at = (volatile char *)mmap(nullptr, 4096, PROT_READ, MAP_SHARED, fd, 0);
        return at[0];
    }
    case 'p': asm volatile("mov $0x8000000000000000, %%rax; mov (%%rax), %%al" ::: "rax"); break;
    case 'A': // EFLAGS.AC: what is not aligned raises SIGBUS, in a handler too.
        asm volatile("pushfq; orl $0x40000, (%%rsp); popfq; mov 1(%%rsp), %%eax" ::: "rax", "cc",
                     "memory");
        break;
    case 's': return deeper(input);
    case 'n': target = nullptr; target(); break;
    case 'w': target = (void (*)())0x10; target(); break;
    case 'k':
        asm volatile("xor %%ebx, %%ebx; mov %%rbx, %%r12; mov %%rbx, %%r13; mov %%rbx, %%r14;"
                     "mov %%rbx, %%r15; xor %%ebp, %%ebp; fld1; fld1; fld1; std; ud2" ::: "memory");
        break;
    case 'm': _mm_setcsr(_mm_getcsr() | 0x8000); *nowhere = 1; break;
    case 'q': {
        int all[2] = {1, 2};
        qsort(all, 2, sizeof all[0], compare);
        break;
    }
    case 'l': return strlen(nowhere);
    case 't': {
        pthread_t thread;
        pthread_create(&thread, nullptr, in_a_thread, nullptr);
        pthread_join(thread, nullptr);
        break;
    }
    case 'e': atexit([] { *nowhere = 1; }); exit(0);
    case 'j': {
        // Moves the stack: nothing leads from there to the call.
        static char other[4096] __attribute__((aligned(16)));
        asm volatile("mov %0, %%rsp; ud2" ::"r"(other + 2048));
        break;
    }
    case 'D': try { Crashes crashes; throw 1; } catch (int) {} break;
    case 'g': (*recovery)[2] = nullptr; *nowhere = 1; break;
    case 'r': return loses_its_frame(len);
    case 'c': try { throw 1; } catch (int) { *nowhere = 1; } break;
    }
    return 0;
}
}
