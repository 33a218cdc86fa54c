//! The environment that a callee's image sees: that of its own worker.

use core::ffi::c_char;

use crate::abi::Graft;

/// `getenv` for an image. The patcher gives each image a three-instruction
/// thunk that adds its graft as the second argument.
///
/// # Safety
/// `name` is NUL-terminated and `graft` the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_getenv(name: *const c_char, graft: *const Graft) -> *const c_char {
    // SAFETY: the environment is a NULL-terminated array of strings that the
    // patcher wrote.
    unsafe {
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
