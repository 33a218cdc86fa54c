//! The environment that a callee's image sees: that of its own worker, which it
//! may change without the caller's being touched.
//!
//! As in the C library, strings that `setenv` made are never freed (somebody
//! may still hold what `getenv` gave), nor are outgrown arrays; each is twice
//! as long as the last. Changes are serialised, reads are not.

use core::ffi::{c_char, c_int};
use core::ptr;

use crate::abi::{Graft, Module, Worker};
use crate::state;

const EINVAL: c_int = 22;
const ENOMEM: c_int = 12;

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
            return ptr::null();
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
    ptr::null()
}

/// Entries of the first array that `setenv` makes, beside what is there.
const SPARE: usize = 16;

/// The graft's environment, while it is changed.
struct Environment<'a> {
    graft: *mut Graft,
    own: &'a state::CLibrary,
    worker: &'a Worker,
}

impl<'a> Environment<'a> {
    unsafe fn of(module: *const Module) -> Environment<'a> {
        // SAFETY: the records are the patcher's and never unmapped.
        unsafe {
            let graft = (*module).graft as *mut Graft;
            Environment {
                graft,
                own: state::of(module),
                worker: &*((*graft).worker as *const Worker),
            }
        }
    }

    /// Sets `errno` and gives -1.
    unsafe fn fails(&self, errno: c_int) -> c_int {
        // SAFETY: the C library's own variable of this thread.
        unsafe { *self.worker.errno_location() = errno };
        -1
    }

    fn array(&self) -> *mut *const c_char {
        // SAFETY: the variable `environ` of the image, which it may assign to.
        unsafe { (&raw const (*self.graft).environ).read_volatile() as *mut *const c_char }
    }

    fn set_array(&self, array: u64) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.graft).environ).write_volatile(array) };
    }

    /// Number of entries.
    unsafe fn len(&self) -> usize {
        let array = self.array();
        let mut len = 0;
        // SAFETY: NULL-terminated, if there is one.
        unsafe {
            while !array.is_null() && !(*array.add(len)).is_null() {
                len += 1;
            }
        }
        len
    }

    /// The entry of a name of so many bytes.
    unsafe fn find(&self, name: *const c_char, len: usize) -> Option<*mut *const c_char> {
        let mut entry = self.array();
        // SAFETY: NULL-terminated strings in a NULL-terminated array.
        unsafe {
            while !entry.is_null() && !(*entry).is_null() {
                if names(*entry, name, len) {
                    return Some(entry);
                }
                entry = entry.add(1);
            }
        }
        None
    }

    /// Puts `text`, whose name has `len` bytes, in the place of the entry of
    /// that name or behind all others; gives 0, or -1 with `errno`.
    unsafe fn put(&self, text: *const c_char, len: usize) -> c_int {
        // SAFETY: under the lock nobody else changes the array.
        unsafe {
            if let Some(entry) = self.find(text, len) {
                *entry = text;
                return 0;
            }
            let count = self.len();
            let array = self.array();
            let ours = array as u64 == self.own.environment.get();
            if !array.is_null() && ours && count + 2 <= self.own.environment_room.get() as usize {
                // The end first: a reader always finds one.
                *array.add(count + 1) = ptr::null();
                *array.add(count) = text;
                return 0;
            }
            let room = 2 * count + SPARE;
            let new = self.worker.malloc(room * size_of::<usize>()) as *mut *const c_char;
            if new.is_null() {
                return self.fails(ENOMEM);
            }
            let mut at = 0;
            while at < count {
                *new.add(at) = *array.add(at);
                at += 1;
            }
            *new.add(count) = text;
            *new.add(count + 1) = ptr::null();
            self.own.environment.set(new as u64);
            self.own.environment_room.set(room as u64);
            self.set_array(new as u64);
            0
        }
    }

    /// Takes every entry of the name away.
    unsafe fn remove(&self, name: *const c_char, len: usize) {
        // SAFETY: as for `put`.
        unsafe {
            while let Some(mut entry) = self.find(name, len) {
                while !(*entry).is_null() {
                    *entry = *entry.add(1);
                    entry = entry.add(1);
                }
            }
        }
    }
}

/// Whether an entry has this name of `len` bytes.
unsafe fn names(entry: *const c_char, name: *const c_char, len: usize) -> bool {
    let mut at = 0;
    // SAFETY: an unequal byte comes at the latest with the entry's end.
    unsafe {
        while at < len {
            if *entry.add(at) != *name.add(at) {
                return false;
            }
            at += 1;
        }
        *entry.add(len) == b'=' as c_char
    }
}

/// Bytes up to NUL or `=`, and whether it was `=`.
unsafe fn name_len(text: *const c_char) -> (usize, bool) {
    let mut len = 0;
    // SAFETY: NUL-terminated.
    unsafe {
        while *text.add(len) != 0 && *text.add(len) != b'=' as c_char {
            len += 1;
        }
        (len, *text.add(len) != 0)
    }
}

unsafe fn text_len(text: *const c_char) -> usize {
    let mut len = 0;
    // SAFETY: NUL-terminated.
    unsafe {
        while *text.add(len) != 0 {
            len += 1;
        }
    }
    len
}

/// `setenv` for an image.
///
/// # Safety
/// `name` is NULL or NUL-terminated, `value` NUL-terminated, and `module` the
/// image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_setenv(
    name: *const c_char,
    value: *const c_char,
    overwrite: c_int,
    module: *const Module,
) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let environment = Environment::of(module);
        if name.is_null() {
            return environment.fails(EINVAL);
        }
        let (len, more) = name_len(name);
        if len == 0 || more {
            return environment.fails(EINVAL);
        }
        let value_len = text_len(value);
        environment.own.locked(|| {
            if overwrite == 0 && environment.find(name, len).is_some() {
                return 0;
            }
            let text = environment.worker.malloc(len + value_len + 2);
            if text.is_null() {
                return environment.fails(ENOMEM);
            }
            ptr::copy_nonoverlapping(name.cast(), text, len);
            *text.add(len) = b'=';
            ptr::copy_nonoverlapping(value.cast(), text.add(len + 1), value_len + 1);
            let result = environment.put(text.cast(), len);
            if result != 0 {
                environment.worker.free(text);
            }
            result
        })
    }
}

/// `putenv` for an image: the string itself becomes the entry, or takes the
/// entry away where it is a name alone.
///
/// # Safety
/// `text` is NUL-terminated and `module` the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_putenv(text: *const c_char, module: *const Module) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let environment = Environment::of(module);
        let (len, value) = name_len(text);
        environment.own.locked(|| {
            if value {
                return environment.put(text, len);
            }
            environment.remove(text, len);
            0
        })
    }
}

/// `unsetenv` for an image.
///
/// # Safety
/// `name` is NULL or NUL-terminated, and `module` the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_unsetenv(name: *const c_char, module: *const Module) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let environment = Environment::of(module);
        if name.is_null() {
            return environment.fails(EINVAL);
        }
        let (len, more) = name_len(name);
        if len == 0 || more {
            return environment.fails(EINVAL);
        }
        environment.own.locked(|| environment.remove(name, len));
        0
    }
}

/// `clearenv` for an image: `environ` is NULL afterwards.
///
/// # Safety
/// `module` is the image's own.
#[cfg_attr(bridge_image, unsafe(no_mangle))]
pub unsafe extern "C" fn ng_clearenv(module: *const Module) -> c_int {
    // SAFETY: as the caller promises.
    unsafe {
        let environment = Environment::of(module);
        environment.own.locked(|| environment.set_array(0));
    }
    0
}
