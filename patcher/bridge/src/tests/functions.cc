// Callees and callers for the tests of unwinding, as compiled code has them.
#include <pthread.h>
#include <setjmp.h>
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
}
