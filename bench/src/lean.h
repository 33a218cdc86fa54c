/*
 * The leanest Foo and Bar that still do what functions do: Bar appends its
 * input, Foo calls it N times and tells the mean. What is measured is then the
 * call itself.
 *
 *   input: "N " and the payload; answer: "<ns per call> <length of the last>"
 *
 * With EXAMPLE, Bar does what nightcore's own example function does: it
 * composes a greeting in memory of its own and appends that.
 */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "worker_v1.h"

#ifdef LEAN_BAR
static __attribute__((noinline)) int lean_bar(const struct context *ctx, const char *input,
                                              size_t length) {
#ifdef EXAMPLE
    static const char greeting[] = "From function Bar: ";
    char *text = malloc(sizeof greeting + length);
    if (text == NULL) {
        return -1;
    }
    memcpy(text, greeting, sizeof greeting - 1);
    memcpy(text + sizeof greeting - 1, input, length);
    ctx->append(ctx->caller_context, text, sizeof greeting - 1 + length);
    free(text);
#else
    ctx->append(ctx->caller_context, input, length);
#endif
    return 0;
}
#endif

#ifndef LEAN_CALLEE
#define LEAN_CALLEE "Bar"
#endif

#ifdef LEAN_FOO
static __attribute__((noinline)) int lean_foo(const struct context *ctx, const char *input,
                                              size_t length) {
    const char *end = input + length;
    const char *output = NULL;
    size_t output_length = 0;
    char text[64];
    long times = 0;
    struct timespec from, to;
    for (; input < end && *input >= '0' && *input <= '9'; input++) {
        times = times * 10 + (*input - '0');
    }
    input += input < end;
    clock_gettime(CLOCK_MONOTONIC, &from);
    for (long i = 0; i < times; i++) {
        int failed =
            LEAN_INVOKE(ctx, LEAN_CALLEE, input, (size_t)(end - input), &output, &output_length);
#ifndef LEAN_MAY_FAIL
        if (failed != 0) {
            return -1;
        }
#else
        (void)failed;
#endif
    }
    clock_gettime(CLOCK_MONOTONIC, &to);
    double ns = (double)(to.tv_sec - from.tv_sec) * 1e9 + (double)(to.tv_nsec - from.tv_nsec);
    int n = snprintf(text, sizeof text, "%.2f %zu", times > 0 ? ns / (double)times : 0.0,
                     output_length);
    ctx->append(ctx->caller_context, text, (size_t)n);
    return 0;
}
#endif
