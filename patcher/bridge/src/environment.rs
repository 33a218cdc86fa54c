//! The environment that a callee's image sees: that of its own worker.

use core::ffi::c_char;

use crate::abi::{Graft, Module};

/// `getenv` for an image; its thunk adds the image as the second argument.
///
/// # Safety
/// `name` is NUL-terminated and `module` the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_getenv(name: *const c_char, module: *const Module) -> *const c_char {
    // SAFETY: the environment is a NULL-terminated array of strings that the
    // patcher wrote.
    unsafe {
        let graft = (*module).graft as *const Graft;
        let mut entry = (*graft).environ as *const *const c_char;
        if entry.is_null() {
            return core::ptr::null();
        }
        while !(*entry).is_null() {
            let (mut left, mut right) = (*entry, name);
            while *right != 0 && *left == *right {
                (left, right) = (left.add(1), right.add(1));
            }
            if *right == 0 && *left == b'=' as c_char && right != name {
                return left.add(1);
            }
            entry = entry.add(1);
        }
    }
    core::ptr::null()
}
