/*
 * Foo with Bar compiled in, under nightcore's own output rules: an output
 * grows by doubling and stays valid to the end of the outermost call; the
 * buffers are used again by the next one.
 */
static int together(const struct context *ctx, const char *name, const char *input, size_t length,
                    const char **output, size_t *output_length);

struct growing {
    char *data;
    size_t length, room;
};

static struct growing *buffers;
static size_t used, made;

static void grow_append(void *context, const char *data, size_t length) {
    struct growing *b = &buffers[(size_t)(uintptr_t)context];
    if (b->length + length > b->room) {
        size_t room = b->room == 0 ? 64 : b->room;
        while (b->length + length > room) {
            room *= 2;
        }
        b->data = realloc(b->data, room);
        if (b->data == NULL) {
            abort();
        }
        b->room = room;
    }
    memcpy(b->data + b->length, data, length);
    b->length += length;
}

static __attribute__((noinline)) int together(const struct context *ctx, const char *name,
                                              const char *input, size_t length,
                                              const char **output, size_t *output_length) {
    *output = NULL;
    *output_length = 0;
    if (strcmp(name, "Bar") != 0) {
        return ctx->invoke(ctx->caller_context, name, input, length, output, output_length);
    }
    if (used == made) {
        size_t more = made == 0 ? 16 : 2 * made;
        buffers = realloc(buffers, more * sizeof *buffers);
        if (buffers == NULL) {
            abort();
        }
        memset(buffers + made, 0, (more - made) * sizeof *buffers);
        made = more;
    }
    size_t index = used++;
    buffers[index].length = 0;
    struct context own = {(void *)(uintptr_t)index, ctx->invoke, grow_append};
    if (lean_bar(&own, input, length) != 0) {
        return -1;
    }
    *output_length = buffers[index].length;
    *output = *output_length > 0 ? buffers[index].data : NULL;
    return 0;
}

#include "lifecycle.h"

int faas_func_call(void *worker_handle, const char *input, size_t length) {
    used = 0;
    return lean_foo(worker_handle, input, length);
}
