//! The bridge in an ordinary process: records as the patcher would write them,
//! around the real C library.

mod call;
mod dl;
mod guard;
mod image;
mod legacy;
mod observe;
mod state;
mod tls;
mod unwind;

use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::abi::{Control, Graft, IMPORTS, Module, STATE_ARMED, SharedEdge, Site, Tls, Worker};
use crate::imports::ng_worker;
use crate::sys;

/// One test at a time: the process has one worker's record.
static SERIAL: Mutex<()> = Mutex::new(());

/// All that a worker with one graft has. Leaked: threads that end later still
/// go by it.
pub(crate) struct World {
    pub(crate) worker: &'static mut Worker,
    pub(crate) graft: &'static mut Graft,
    pub(crate) modules: &'static mut [Module],
    pub(crate) shared: &'static SharedEdge,
    pub(crate) site: &'static mut Site,
    _serial: MutexGuard<'static, ()>,
}

// SAFETY: what tests use from several threads is what the bridge does.
unsafe impl Sync for World {}

pub(crate) fn zeroed<T>() -> &'static mut T {
    // SAFETY: every record is integers, cells and arrays of them.
    Box::leak(Box::new(unsafe { core::mem::zeroed() }))
}

pub(crate) fn string(text: &str) -> u64 {
    CString::new(text).expect("no NUL").into_raw() as u64
}

pub(crate) const NAME: &str = "Bar";

impl World {
    /// A graft with these modules' thread-local storage, armed, its gate on.
    pub(crate) fn new(storage: &[Tls]) -> World {
        let serial = SERIAL.lock().unwrap_or_else(PoisonError::into_inner);
        let (worker, graft, site): (&mut Worker, &mut Graft, &mut Site) =
            (zeroed(), zeroed(), zeroed());
        let modules: &'static mut [Module] = Box::leak(
            storage
                .iter()
                // SAFETY: as above.
                .map(|_| unsafe { core::mem::zeroed::<Module>() })
                .collect(),
        );
        let shared: &'static SharedEdge = zeroed();
        // SAFETY: a zeroed area, too large for a stack.
        worker.control =
            unsafe { std::alloc::alloc_zeroed(std::alloc::Layout::new::<Control>()) as u64 };
        for (slot, name) in worker.imports.iter_mut().zip(IMPORTS) {
            let name = CString::new(name).expect("no NUL");
            // SAFETY: a lookup in this process.
            *slot = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) } as u64;
        }
        worker.thread = sys::thread_pointer();
        worker.arena_budget = 1 << 30;
        worker.memcpy.set(memcpy as *const () as u64);
        worker.grafts[0] = core::ptr::from_ref(graft) as u64;
        worker.count = 1.into();
        worker.names = crate::names::fill([(NAME.as_bytes(), 0)]);
        graft.shared = core::ptr::from_ref(shared) as u64;
        graft.worker = core::ptr::from_ref(worker) as u64;
        graft.name = string(NAME);
        graft.state = STATE_ARMED.into();
        graft.faas_init = faas_init as *const () as u64;
        graft.faas_create = faas_create as *const () as u64;
        graft.modules = modules.as_ptr() as u64;
        graft.module_count = modules.len() as u64;
        let order: Vec<u64> = (modules.iter().map(|m| core::ptr::from_ref(m) as u64)).collect();
        graft.init_order_count = order.len() as u64;
        graft.init_order = Vec::leak(order).as_ptr() as u64;
        for (module, tls) in modules.iter_mut().zip(storage) {
            module.graft = core::ptr::from_ref(graft) as u64;
            module.tls = *tls;
            module.tls.index = graft.tls_count;
            graft.tls_count += u64::from(tls.mem_size != 0);
        }
        site.worker = core::ptr::from_ref(worker) as u64;
        shared.gate.store(1, std::sync::atomic::Ordering::Relaxed);
        ng_worker.store(
            core::ptr::from_ref(worker) as u64,
            std::sync::atomic::Ordering::SeqCst,
        );
        World {
            worker,
            graft,
            modules,
            shared,
            site,
            _serial: serial,
        }
    }

    /// Starts the initialisers, as a first call does, and waits for their end;
    /// gives the state that they left.
    pub(crate) fn initialise(&self) -> u8 {
        use std::sync::atomic::Ordering::Acquire;
        // SAFETY: this thread is the worker's.
        let ready = unsafe { crate::start::advance(self.graft, self.worker) };
        assert!(!ready);
        loop {
            match self.graft.state.load(Acquire) {
                crate::abi::STATE_INITIALISING => std::thread::yield_now(),
                state => return state,
            }
        }
    }

    /// The same, and takes over what they left.
    pub(crate) fn make_ready(&self) {
        assert_eq!(self.initialise(), crate::abi::STATE_INITIALISED);
        // SAFETY: as above.
        assert!(unsafe { crate::start::advance(self.graft, self.worker) });
    }

    /// Gives the last module these initialisers.
    pub(crate) fn initialisers(&mut self, functions: &[unsafe extern "C" fn()]) {
        let list: Vec<u64> = functions.iter().map(|f| *f as usize as u64).collect();
        let module = self.modules.last_mut().expect("there is one");
        module.init_count = list.len() as u64;
        module.inits = Vec::leak(list).as_ptr() as u64;
    }
}

unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the bridge passes disjoint ranges.
    unsafe { core::ptr::copy_nonoverlapping(from, to, len) };
    to
}

extern "C" fn faas_init() -> i32 {
    0
}

unsafe extern "C" fn faas_create(
    context: *mut core::ffi::c_void,
    _invoke: u64,
    _append: u64,
    handle: *mut *mut core::ffi::c_void,
) -> i32 {
    // SAFETY: the bridge's variable.
    unsafe { handle.write(context) };
    0
}
