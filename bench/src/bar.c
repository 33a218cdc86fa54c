#include "lifecycle.h"
int faas_func_call(void *worker_handle, const char *input, size_t length) {
    return lean_bar(worker_handle, input, length);
}
