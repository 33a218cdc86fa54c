use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::World;
use crate::abi::{Module, Tls, TlsIndex};
use crate::legacy::{ng_setspecific, ng_thread_atexit, ng_tss_set};
use crate::sys;
use crate::tls::ng_tls_get_addr;

static MODULE: AtomicU64 = AtomicU64::new(0);
static KEYS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
static THREAD: AtomicU64 = AtomicU64::new(0);
/// What was destroyed, one decimal digit each, in order.
static DESTROYED: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn destroy(object: *mut core::ffi::c_void) {
    DESTROYED.store(DESTROYED.load(SeqCst) * 10 + object as u64, SeqCst);
}

fn variable() -> *mut u64 {
    let index = TlsIndex {
        module: MODULE.load(SeqCst),
        offset: 8,
    };
    // SAFETY: the index is the test's module's.
    unsafe { ng_tls_get_addr(&index).cast() }
}

unsafe extern "C" fn constructor() {
    THREAD.store(sys::thread_pointer(), SeqCst);
    let module = MODULE.load(SeqCst) as *const Module;
    // SAFETY: keys of the test's, the module's own record.
    unsafe {
        *variable() = 42;
        for (number, key) in (1..).zip(&KEYS) {
            let mut new = 0;
            assert_eq!(libc::pthread_key_create(&mut new, Some(destroy)), 0);
            key.store(u64::from(new), SeqCst);
            assert_eq!(ng_setspecific(new, 99 as _, module), 0);
            assert_eq!(ng_tss_set(new, number as *const _, module), 0);
        }
        // Gone before the end, and never the thread's.
        assert_eq!(libc::pthread_key_delete(KEYS[2].load(SeqCst) as u32), 0);
        for object in [7, 8] {
            assert_eq!(
                ng_thread_atexit(destroy as *const () as u64, object, 0, module),
                0
            );
        }
    }
}

#[test]
fn what_the_initialisers_bound_to_their_thread_is_the_workers() {
    // The worker's thread ends here, so that its destructors are seen.
    std::thread::spawn(|| {
        let mut world = World::new(&[Tls {
            mem_size: 16,
            align: 8,
            ..Tls::default()
        }]);
        MODULE.store(core::ptr::from_ref(&world.modules[0]) as u64, SeqCst);
        world.initialisers(&[constructor]);
        assert_eq!(world.initialise(), crate::abi::STATE_INITIALISED);
        // The initialisers' thread is gone or goes; nothing is destroyed then.
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_ne!(THREAD.load(SeqCst), sys::thread_pointer());
        assert_eq!(DESTROYED.load(SeqCst), 0);
        let value = |key: usize| {
            // SAFETY: a key of the test's.
            unsafe { libc::pthread_getspecific(KEYS[key].load(SeqCst) as u32) as u64 }
        };
        assert_eq!(value(0), 0);
        // SAFETY: this thread is the worker's.
        assert!(unsafe { crate::start::advance(world.graft, world.worker) });
        assert_eq!((value(0), value(1), value(2)), (1, 2, 0));
        // SAFETY: a variable of this thread's.
        assert_eq!(unsafe { *variable() }, 42);
        assert_eq!(world.graft.legacy.get(), 0);
        // From now on it is the C library's affair.
        let module = MODULE.load(SeqCst) as *const Module;
        // SAFETY: the module's own record.
        unsafe {
            assert_eq!(
                ng_thread_atexit(destroy as *const () as u64, 9, 0, module),
                0
            );
            let key = KEYS[1].load(SeqCst) as u32;
            assert_eq!(ng_setspecific(key, 5 as _, module), 0);
            assert_eq!(ng_setspecific(12345, 5 as _, module), libc::EINVAL);
            assert_eq!(ng_tss_set(12345, 5 as _, module), 2);
        }
        assert_eq!(value(1), 5);
    })
    .join()
    .expect("no panic");
    // Objects, last first; then keys.
    assert_eq!(DESTROYED.load(SeqCst), 98_715);
}
