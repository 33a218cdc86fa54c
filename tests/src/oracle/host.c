/*
 * Loads the library that its argument names with the machine's own ld.so, but
 * runs none of its initialisers: what is in memory is what ld.so made of it.
 *
 *   int3 at r_brk ─► every newly mapped object loses its initialisers: in its
 *   dynamic section DT_INIT becomes a function that does nothing, and
 *   DT_INIT_ARRAY empty. ld.so calls r_brk after it has mapped objects and
 *   before it initialises them, for debuggers (<link.h>).
 *
 * Then it says what it has loaded, and answers to what it is asked on its
 * standard input, a line each. As a program at a fixed address it has copies
 * of variables of the C and C++ libraries, and it defines a function that the
 * C library defines too.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <link.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <ucontext.h>
#include <unistd.h>

enum { MOST = 4096, PAGE = 4096 };

/* Never used: references from code at a fixed address ask for copies. */
extern char cout[272] __asm__("_ZSt4cout");
void *volatile copied[4];

int getpagesize(void) { return PAGE; }

/* What an object said of its initialisers and of what runs at its end. */
struct routines {
  uintptr_t function, array, bytes;
};
struct object {
  uintptr_t bias;
  struct routines init, fini;
};

static struct object objects[MOST];
static int count;
static int silencing;
static struct r_debug *debug;

static void nothing(void) {}

/* The protection with which the address was mapped. */
static int protection(struct dl_phdr_info *info, uintptr_t at) {
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr) *p = &info->dlpi_phdr[i];
    uintptr_t start = info->dlpi_addr + p->p_vaddr;
    if (p->p_type == PT_LOAD && at >= start && at < start + p->p_memsz)
      return (p->p_flags & PF_R ? PROT_READ : 0) | (p->p_flags & PF_W ? PROT_WRITE : 0) |
             (p->p_flags & PF_X ? PROT_EXEC : 0);
  }
  _exit(90);
}

/* An entry is 16 bytes and aligned to 8: its value lies in one page. */
static void set(struct dl_phdr_info *info, ElfW(Dyn) *entry, uintptr_t value) {
  uintptr_t at = (uintptr_t)&entry->d_un;
  int with = protection(info, at);
  void *page = (void *)(at & ~(PAGE - 1UL));
  if (!(with & PROT_WRITE) && mprotect(page, PAGE, PROT_READ | PROT_WRITE))
    _exit(91);
  entry->d_un.d_ptr = value;
  if (!(with & PROT_WRITE) && mprotect(page, PAGE, with))
    _exit(91);
}

static int take(struct dl_phdr_info *info, size_t size, void *data) {
  (void)size, (void)data;
  for (int i = 0; i < count; i++)
    if (objects[i].bias == info->dlpi_addr)
      return 0;
  if (count == MOST)
    _exit(92);
  struct object *object = &objects[count++];
  *object = (struct object){.bias = info->dlpi_addr};
  if (!silencing)
    return 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    if (info->dlpi_phdr[i].p_type != PT_DYNAMIC)
      continue;
    ElfW(Dyn) *entry = (void *)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
    for (; entry->d_tag != DT_NULL; entry++)
      switch (entry->d_tag) {
      case DT_INIT:
        object->init.function = entry->d_un.d_ptr;
        set(info, entry, (uintptr_t)nothing - info->dlpi_addr);
        break;
      case DT_INIT_ARRAY:
        object->init.array = entry->d_un.d_ptr;
        break;
      case DT_INIT_ARRAYSZ:
        object->init.bytes = entry->d_un.d_val;
        set(info, entry, 0);
        break;
      case DT_FINI:
        object->fini.function = entry->d_un.d_ptr;
        break;
      case DT_FINI_ARRAY:
        object->fini.array = entry->d_un.d_ptr;
        break;
      case DT_FINI_ARRAYSZ:
        object->fini.bytes = entry->d_un.d_val;
        break;
      }
  }
  return 0;
}

/* r_brk is an empty function: to return from it is all there is to do. */
static void on_trap(int signal, siginfo_t *about, void *context) {
  (void)signal, (void)about;
  greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  registers[REG_RIP] = *(greg_t *)registers[REG_RSP];
  registers[REG_RSP] += 8;
  if (debug->r_state == RT_CONSISTENT)
    dl_iterate_phdr(take, NULL);
}

static void watch(void) {
  for (ElfW(Dyn) *entry = _DYNAMIC; entry->d_tag != DT_NULL; entry++)
    if (entry->d_tag == DT_DEBUG)
      debug = (struct r_debug *)entry->d_un.d_ptr;
  struct sigaction action = {.sa_sigaction = on_trap, .sa_flags = SA_SIGINFO};
  char *page = (char *)(debug->r_brk & ~(PAGE - 1UL));
  if (sigaction(SIGTRAP, &action, NULL) || mprotect(page, PAGE, PROT_READ | PROT_WRITE | PROT_EXEC))
    _exit(93);
  *(unsigned char *)debug->r_brk = 0xcc;
  if (mprotect(page, PAGE, PROT_READ | PROT_EXEC))
    _exit(93);
}

static int say(struct dl_phdr_info *info, size_t size, void *out) {
  (void)size;
  struct object *object = NULL;
  for (int i = 0; i < count; i++)
    if (objects[i].bias == info->dlpi_addr)
      object = &objects[i];
  uintptr_t unwind = 0;
  for (int i = 0; i < info->dlpi_phnum; i++)
    if (info->dlpi_phdr[i].p_type == PT_GNU_EH_FRAME)
      unwind = info->dlpi_addr + info->dlpi_phdr[i].p_vaddr;
  if (!object)
    _exit(94);
  fprintf(out, "%lx %lx %lx %lx %lx %lx %lx %lx %lx %lx\n", (long)info->dlpi_addr,
          (long)info->dlpi_tls_modid, (long)info->dlpi_tls_data, unwind, object->init.function,
          object->init.array, object->init.bytes, object->fini.function, object->fini.array,
          object->fini.bytes);
  return 0;
}

static unsigned long descriptor(unsigned long at) {
  __asm__ volatile("call *(%%rax)" : "+a"(at) : : "memory", "cc");
  return at;
}

extern void *__tls_get_addr(unsigned long *);

int main(int argc, char **argv) {
  copied[0] = cout, copied[1] = stdout, copied[2] = environ, copied[3] = stderr;
  if (argc != 2 || prctl(PR_SET_PDEATHSIG, SIGKILL))
    return 2;
  /* Not allowed, it only runs less isolated. */
  if (unshare(CLONE_NEWNET | CLONE_NEWIPC)) {
  }
  struct rlimit none = {0, 0}, seconds = {60, 60};
  setrlimit(RLIMIT_CORE, &none);
  setrlimit(RLIMIT_CPU, &seconds);
  FILE *in = fdopen(fcntl(0, F_DUPFD_CLOEXEC, 100), "r");
  FILE *out = fdopen(fcntl(1, F_DUPFD_CLOEXEC, 100), "w");
  int null = open("/dev/null", O_RDWR | O_CLOEXEC);
  for (int i = 0; i < 3; i++)
    dup2(null, i);

  dl_iterate_phdr(take, NULL);
  int startup = count;
  silencing = 1;
  watch();
  void *library = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  struct link_map *map;
  if (!library || dlinfo(library, RTLD_DI_LINKMAP, &map)) {
    fprintf(out, "error %s\n", dlerror());
    fflush(out);
    return 1;
  }
  char *pointer = __builtin_thread_pointer();
  fprintf(out, "%s\n%lx\n%x\n", map->l_name, (long)pointer, startup);
  dl_iterate_phdr(say, out);
  fprintf(out, "\n");
  fflush(out);
  char what;
  unsigned long first, second;
  while (fscanf(in, " %c %lx %lx", &what, &first, &second) == 3) {
    unsigned long answer = 0;
    if (what == 'c')
      answer = ((unsigned long (*)(void))first)();
    else if (what == 'd')
      answer = descriptor(first);
    else if (what == 't')
      answer = (char *)__tls_get_addr((unsigned long[]){first, second}) - pointer;
    fprintf(out, "%lx\n", answer);
    fflush(out);
  }
  return 0;
}
