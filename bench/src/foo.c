#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    return lean_foo(worker_handle, input, length);
}
