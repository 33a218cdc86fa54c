use std::ffi::{c_char, c_int, c_void};

use super::World;
use crate::call::ng_invoke;

unsafe extern "C" fn invoke(
    context: *mut c_void,
    name: *const c_char,
    input: *const u8,
    len: usize,
    output: *mut *const u8,
    output_len: *mut usize,
) -> c_int {
    // SAFETY: the test's locals.
    unsafe {
        assert_eq!(
            (context as u64, *name, *input, len),
            (77, b'Q' as c_char, b'i', 5)
        );
        (*output, *output_len) = (input, len);
    }
    0
}

#[test]
fn nested_calls_take_the_callers_context_and_only_from_within_a_call() {
    let world = World::new(&[]);
    world.worker.invoke = invoke as *const () as u64;
    world.graft.caller_context.set(77);
    let graft = core::ptr::from_ref(&*world.graft) as usize;
    let nested = move || {
        let (mut output, mut len) = (core::ptr::dangling(), 1);
        // SAFETY: what a callee passes.
        let result = unsafe {
            ng_invoke(
                graft as *mut c_void,
                c"Qux".as_ptr(),
                b"input".as_ptr(),
                5,
                &mut output,
                &mut len,
            )
        };
        (result, output.is_null(), len)
    };
    assert_eq!(nested(), (-1, true, 0), "no call is active");
    world.graft.busy.set(1);
    assert_eq!(nested(), (0, false, 5));
    let elsewhere = std::thread::spawn(nested).join().expect("no panic");
    assert_eq!(
        elsewhere,
        (0, false, 5),
        "a thread that the callee waits for"
    );
    // The routine's window is passed by.
    world.worker.invoke = 0;
    world.worker.resume = (invoke as *const () as u64).into();
    let elsewhere = std::thread::spawn(nested).join().expect("no panic");
    assert_eq!(elsewhere, (0, false, 5));
}
