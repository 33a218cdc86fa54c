/* Two libraries for the tests of the dynamic linker's functions. */
#ifdef FIRST
long strtol(const char *, char **, int);
long needs_libc(const char *text) { return strtol(text, 0, 10); }

int answer_1(void) { return 1; }
int answer_2(void) { return 2; }
__asm__(".symver answer_1, answer@V1");
__asm__(".symver answer_2, answer@@V2");

static int chosen_one(void) { return 11; }
static void *choose(void) { return chosen_one; }
int chosen(void) __attribute__((ifunc("choose")));

__thread int counter = 5;
int *counter_address(void) { return &counter; }

int getppid(void) { return 7; }
int variable = 3;
#else
int answer_2(void);
int *order;
/* With the digits of what ran before. */
void constructor(void) { *order = *order * 10 + 2; }
int only_second(void) { return answer_2() + 20; }
#endif
