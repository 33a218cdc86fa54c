//! A compiled caller in this process, called as a worker calls it, with its
//! windows written and reverted.

use std::arch::global_asm;
use std::ffi::{CString, c_char, c_int, c_void};
use std::path::Path;
use std::sync::Mutex;

use nightgraft_patcher::code::{CodeMap, StubError, Tail, Window};

/// One of these is at the start of each site's record.
pub(crate) type Counter = u64;

type Invoke = extern "C" fn(
    *mut c_void,
    *const c_char,
    *const u8,
    usize,
    *mut *const u8,
    *mut usize,
) -> c_int;
type Append = extern "C" fn(*mut c_void, *const u8, usize);

// What the bridge's entry gets: [rsp] = the target, [rsp+8] = the return
// address, r11 = the site's record. This one counts and goes on.
global_asm!(
    ".globl code_test_bridge_entry",
    "code_test_bridge_entry:",
    "inc qword ptr [r11]",
    "pop r11",
    "jmp r11",
    // What the bridge's entry for a function gets: [rsp] = r11, [rsp+8] = the
    // return address, r11 = the record: a counter, where to go on, and room for
    // the return address. This one goes on with all registers as they were.
    ".globl code_test_called",
    "code_test_called:",
    "inc qword ptr [r11]",
    "push rax",
    "mov rax, [rsp + 16]",
    "mov [r11 + 16], rax",
    "pop rax",
    "mov r11, [r11 + 8]",
    "xchg r11, [rsp]",
    "ret",
);

unsafe extern "C" {
    fn code_test_bridge_entry();
    fn code_test_called();
}

/// Code is written while nobody else runs it.
pub(crate) static ALONE: Mutex<()> = Mutex::new(());

/// What one request did: everything that a worker could tell apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Answer {
    pub(crate) code: c_int,
    pub(crate) output: Vec<u8>,
    /// Names and inputs, in the order of the calls.
    pub(crate) invoked: Vec<(String, Vec<u8>)>,
}

#[derive(Default)]
struct Context {
    answer: Answer,
    outputs: Vec<Box<[u8]>>,
}

extern "C" fn invoke(
    context: *mut c_void,
    name: *const c_char,
    input: *const u8,
    length: usize,
    output: *mut *const u8,
    output_length: *mut usize,
) -> c_int {
    // SAFETY: the library passes back the context that `call` gave it, which
    // outlives the call, and pointers that the ABI says are valid.
    unsafe {
        let context = &mut *context.cast::<Context>();
        let name = std::ffi::CStr::from_ptr(name)
            .to_string_lossy()
            .into_owned();
        let input = if length == 0 {
            Vec::new()
        } else {
            std::slice::from_raw_parts(input, length).to_vec()
        };
        let mut result = name.clone().into_bytes();
        result.push(b':');
        result.extend(input.iter().rev());
        *output = result.as_ptr();
        *output_length = result.len();
        let failed = input.contains(&b'!');
        context.answer.invoked.push((name, input));
        let kept = result.into_boxed_slice();
        *output = kept.as_ptr();
        context.outputs.push(kept);
        -c_int::from(failed)
    }
}

extern "C" fn append(context: *mut c_void, data: *const u8, length: usize) {
    // SAFETY: as for `invoke`.
    unsafe {
        let context = &mut *context.cast::<Context>();
        let data = std::slice::from_raw_parts(data, length);
        context.answer.output.extend_from_slice(data);
    }
}

/// What the stub at a function's entry goes by.
#[derive(Default)]
#[repr(C)]
struct Entry {
    /// Entries that came by while the flag was set, where they go on, and where
    /// the last one returns to.
    record: [u64; 3],
    flag: u8,
}

/// A library in this process. It stays loaded.
pub(crate) struct Live {
    handle: *mut c_void,
    pub(crate) bias: u64,
    pub(crate) sites: Vec<(Window, Box<Counter>)>,
    entry: Option<(Window, Box<Entry>)>,
    island: u64,
    used: u64,
}

const PAGE: u64 = 4096;
const ISLAND: u64 = 16 * PAGE;

impl Live {
    pub(crate) fn load(library: &Path) -> Live {
        let path = CString::new(library.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: the library is one of our fixtures; its initialisers do nothing.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{} can't be loaded", library.display());
        let mut live = Live {
            handle,
            bias: 0,
            sites: Vec::new(),
            entry: None,
            island: 0,
            used: 0,
        };
        let call = live.symbol(c"faas_func_call");
        // SAFETY: `info` is valid for writes, and dladdr only reads the maps
        // of the loader.
        let info = unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            assert_ne!(libc::dladdr(call, &raw mut info), 0);
            info
        };
        live.bias = info.dli_fbase as u64;
        live.island = island_near(live.bias, ISLAND);
        live
    }

    fn symbol(&self, name: &std::ffi::CStr) -> *const c_void {
        // SAFETY: the handle is open.
        let symbol = unsafe { libc::dlsym(self.handle, name.as_ptr()) };
        assert!(!symbol.is_null(), "{name:?} is missing");
        symbol
    }

    /// Handles each request in a fresh worker handle.
    pub(crate) fn serve(&self, requests: &[Vec<u8>]) -> Vec<Answer> {
        type Create = extern "C" fn(*mut c_void, Invoke, Append, *mut *mut c_void) -> c_int;
        type Globals = extern "C" fn(*mut c_void, Invoke, Append);
        type Call = extern "C" fn(*mut c_void, *const u8, usize) -> c_int;
        // SAFETY: these are the ABI's types of these symbols.
        let (create, globals, call) = unsafe {
            (
                std::mem::transmute::<*const c_void, Create>(
                    self.symbol(c"faas_create_func_worker"),
                ),
                std::mem::transmute::<*const c_void, Globals>(self.symbol(c"use_globals")),
                std::mem::transmute::<*const c_void, Call>(self.symbol(c"faas_func_call")),
            )
        };
        requests
            .iter()
            .map(|request| {
                let mut context = Box::new(Context::default());
                let pointer: *mut c_void = (&raw mut *context).cast();
                let mut handle = std::ptr::null_mut();
                globals(pointer, invoke, append);
                assert_eq!(create(pointer, invoke, append, &raw mut handle), 0);
                let code = call(handle, request.as_ptr(), request.len());
                context.answer.code = code;
                std::mem::take(&mut context.answer)
            })
            .collect()
    }

    fn reserve(&mut self) -> u64 {
        let at = self.island + self.used;
        self.used += STUB;
        assert!(self.used <= ISLAND);
        at
    }

    /// Leads every site to the counting bridge, and the function's entry too,
    /// while its flag is set.
    pub(crate) fn patch(&mut self, map: &CodeMap) {
        for site in map.all_sites() {
            let window = site.window.expect("checked before");
            let record = Box::new(0);
            let at = self.reserve();
            self.graft(&window, at, &counting(&record));
            self.sites.push((window, record));
        }
        let window = map.entry_window("faas_func_call").expect("checked before");
        let mut entry = Box::<Entry>::default();
        let at = self.reserve();
        let tail = Tail::Called {
            flag: &raw const entry.flag as u64,
            record: &raw const entry.record as u64,
            bridge_entry: code_test_called as *const () as u64,
        };
        let stub = window.stub(self.bias, at, &tail).expect("in reach");
        entry.record[1] = at + u64::from(stub.boundaries[0].1);
        self.graft(&window, at, &tail);
        self.entry = Some((window, entry));
    }

    fn graft(&self, window: &Window, at: u64, tail: &Tail) {
        let all = lead(window, self.bias, at, tail).expect("a stub in reach");
        write_all(&all);
    }

    pub(crate) fn set_flag(&mut self, on: bool) {
        if let Some((_, entry)) = &mut self.entry {
            // SAFETY: the box is alive; the stub reads it too.
            unsafe { (&raw mut entry.flag).write_volatile(u8::from(on)) };
        }
    }

    fn record(&self) -> [u64; 3] {
        let (_, entry) = self.entry.as_ref().expect("patched");
        // SAFETY: the box is alive; the stub writes it.
        unsafe { (&raw const entry.record).read_volatile() }
    }

    /// Entries into `faas_func_call` that came by while the flag was set.
    pub(crate) fn entries(&self) -> u64 {
        self.record()[0]
    }

    /// Whether the last one was seen to return into this program.
    pub(crate) fn returns_here(&self) -> bool {
        let base = |at: *const c_void| {
            // SAFETY: dladdr only reads the loader's maps.
            unsafe {
                let mut info: libc::Dl_info = std::mem::zeroed();
                (libc::dladdr(at, &raw mut info) != 0).then_some(info.dli_fbase)
            }
        };
        let here = base(code_test_called as *const c_void);
        here.is_some() && base(self.record()[2] as *const c_void) == here
    }

    /// Calls that passed the site at this index.
    pub(crate) fn count(&self, site: usize) -> u64 {
        // SAFETY: the box is alive; the stub writes it.
        unsafe { (&raw const *self.sites[site].1).read_volatile() }
    }

    /// Puts every original byte back.
    pub(crate) fn revert(&mut self) {
        let windows = self.sites.iter().map(|s| &s.0);
        for window in windows.chain(self.entry.iter().map(|e| &e.0)) {
            write_all(&original(window, self.bias));
        }
    }
}

/// Code to be written: where, and what.
pub(crate) type Write = (u64, Vec<u8>);

/// Bytes between two stubs.
pub(crate) const STUB: u64 = 256;

/// What leads a window of a library to a stub, in the order in which it is to
/// be written, if a stub there can do it.
pub(crate) fn lead(
    window: &Window,
    bias: u64,
    at: u64,
    tail: &Tail,
) -> Result<Vec<Write>, StubError> {
    let stub = window.stub(bias, at, tail)?;
    assert!(stub.bytes.len() as u64 <= STUB);
    let mut all = vec![(at, stub.bytes)];
    let hop = window.hop_after(bias, at).expect("a stub in reach");
    if let (Some(hop), Some(after)) = (&window.hop, hop) {
        all.push((bias + hop.at.0, after));
    }
    let after = window.after(bias, at).expect("a stub in reach");
    all.push((bias + window.start.0, after));
    for ((at, before), (_, after)) in original(window, bias).iter().zip(all.iter().rev()) {
        assert_eq!(after.len(), before.len());
        let found = read_code(*at, before.len());
        assert_eq!(found, *before, "file and memory");
    }
    Ok(all)
}

/// What takes a window out again, in order.
pub(crate) fn original(window: &Window, bias: u64) -> Vec<Write> {
    let hop = window.hop.as_ref();
    let hop = hop.map(|hop| (bias + hop.at.0, hop.before.clone()));
    let own = (bias + window.start.0, window.before.clone());
    [own].into_iter().chain(hop).collect()
}

/// Writes code, a page at a time.
pub(crate) fn write_all(all: &[Write]) {
    for (at, bytes) in all {
        write_code(*at, bytes);
    }
}

/// A tail that counts in `counter` and goes on.
pub(crate) fn counting(counter: &Counter) -> Tail {
    Tail::Bridge {
        site_record: std::ptr::from_ref(counter) as u64,
        bridge_entry: code_test_bridge_entry as *const () as u64,
    }
}

fn read_code(at: u64, length: usize) -> Vec<u8> {
    // SAFETY: the window lies in the mapped library.
    unsafe { std::slice::from_raw_parts(at as *const u8, length).to_vec() }
}

fn write_code(at: u64, bytes: &[u8]) {
    let page = at & !(PAGE - 1);
    assert!(at + bytes.len() as u64 <= page + PAGE, "within one page");
    let page = page as *mut c_void;
    // SAFETY: the page is ours (the island) or the library's text, which no
    // other thread executes while `ALONE` is held.
    unsafe {
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        assert_eq!(libc::mprotect(page, PAGE as usize, rw), 0);
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len());
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        assert_eq!(libc::mprotect(page, PAGE as usize, rx), 0);
    }
}

/// Maps an island below a library, within 1 GiB.
pub(crate) fn island_near(bias: u64, size: u64) -> u64 {
    for step in 1..512 {
        let hint = (bias & !(PAGE - 1)) - step * (2 << 20);
        // SAFETY: MAP_FIXED_NOREPLACE takes no memory that is in use.
        let mapped = unsafe {
            libc::mmap(
                hint as *mut c_void,
                size as usize,
                libc::PROT_READ,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        if mapped as u64 == hint {
            return hint;
        }
        assert_eq!(
            mapped,
            libc::MAP_FAILED,
            "an old kernel took the hint loosely"
        );
    }
    panic!("no room for an island near {bias:#x}");
}
