use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use super::image::{Library, libraries};
use super::{World, string};
use crate::abi::{Import, Module, ScopeEntry, Tls};
use crate::dl::*;

const GLOBAL: u64 = 0;
const NEXT: u64 = u64::MAX;

/// Fills a record in from what the dynamic linker has mapped.
fn describe(module: &mut Module, library: &Library, path: &str, soname: &str) {
    // SAFETY: link_map and dynamic section are the dynamic linker's; it has
    // made the addresses in the section live ones.
    unsafe {
        let [bias, _, dynamic, ..] = *(library.link_map() as *const [u64; 5]);
        module.bias = bias;
        module.dynamic = dynamic;
        let mut entry = dynamic as *const [u64; 2];
        while (*entry)[0] != 0 {
            let value = (*entry)[1];
            match (*entry)[0] {
                4 => module.symbol_count = u64::from((value as *const [u32; 2]).read()[1]),
                5 => module.strings = value,
                6 => module.symbols = value,
                0x6fff_fff0 => module.versions = value,
                // The one that it leaves as it is.
                0x6fff_fffc => module.version_definitions = bias + value,
                0x6fff_fffd => module.version_definition_count = value,
                _ => {}
            }
            entry = entry.add(1);
        }
        let header = bias as *const u8;
        module.phdr = bias + header.add(32).cast::<u64>().read();
        module.phnum = u64::from(header.add(56).cast::<u16>().read());
        module.range.start = bias;
        for index in 0..module.phnum {
            let [kind, _, address, _, file, memory, align] =
                *((module.phdr + index * 56) as *const [u64; 7]);
            match kind as u32 {
                1 => module.range.len = address + memory,
                7 => {
                    module.tls.image = bias + address;
                    module.tls.file_size = file;
                    module.tls.mem_size = memory;
                    module.tls.align = align;
                    module.tls.skew = address % align;
                }
                _ => {}
            }
        }
        module.path = string(path);
        module.soname = string(soname);
    }
}

/// A graft of the first library, and of the second one on demand.
fn world() -> World {
    let [first, second] = libraries();
    let world = World::new(&[
        Tls {
            mem_size: 4,
            ..Tls::default()
        },
        Tls::default(),
    ]);
    describe(
        &mut world.modules[0],
        first,
        "/callee/libfirst.so",
        "libfirst.so",
    );
    describe(
        &mut world.modules[1],
        second,
        "/callee/libsecond.so",
        "libsecond.so",
    );
    world.modules[1].on_demand = 1;
    world.graft.init_order_count = 1;
    world.make_ready();
    world
}

fn first(world: &World) -> *const Module {
    &raw const world.modules[0]
}

fn dlsym(world: &World, handle: u64, name: &str) -> u64 {
    let name = CString::new(name).expect("no NUL");
    // SAFETY: the module is the graft's.
    unsafe { ng_dlsym(handle, name.as_ptr(), first(world)) }
}

fn call(address: u64) -> c_int {
    assert_ne!(address, 0);
    // SAFETY: a function of the tests' libraries.
    unsafe { core::mem::transmute::<usize, extern "C" fn() -> c_int>(address as usize)() }
}

fn dlopen(world: &World, path: &str, mode: c_int) -> u64 {
    let path = CString::new(path).expect("no NUL");
    // SAFETY: as above.
    unsafe { ng_dlopen(path.as_ptr(), mode, first(world)) }
}

fn dlerror(world: &World) -> Option<String> {
    // SAFETY: the text stays until the next error.
    unsafe {
        let text = ng_dlerror(first(world));
        (!text.is_null()).then(|| CStr::from_ptr(text).to_str().expect("text").to_owned())
    }
}

#[test]
fn symbols_are_found_with_their_versions_kinds_and_blocks() {
    let world = world();
    for handle in [GLOBAL, first(&world) as u64] {
        assert_eq!(
            call(dlsym(&world, handle, "answer")),
            2,
            "the default version"
        );
        assert_eq!(
            call(dlsym(&world, handle, "chosen")),
            11,
            "the IFUNC's choice"
        );
        let counter = dlsym(&world, handle, "counter");
        assert_eq!(counter, world.modules[0].home_block.get());
        // SAFETY: this thread's block.
        assert_eq!(unsafe { *(counter as *const i32) }, 5);
        for (version, expected) in [(c"V1", Some(1)), (c"V2", Some(2)), (c"V3", None)] {
            // SAFETY: as above.
            let found =
                unsafe { ng_dlvsym(handle, c"answer".as_ptr(), version.as_ptr(), first(&world)) };
            assert_eq!((found != 0).then(|| call(found)), expected, "{version:?}");
        }
    }
    // Another thread's block of the variable is another one.
    let counter = dlsym(&world, GLOBAL, "counter");
    std::thread::scope(|scope| {
        scope.spawn(|| assert_ne!(dlsym(&world, GLOBAL, "counter"), counter));
    });
    // The worker's global scope comes first, and a library of its own is asked
    // behind what is searched for.
    let theirs = libc::getppid as *const () as u64;
    assert_eq!(dlsym(&world, GLOBAL, "getppid"), theirs);
    assert_eq!(call(dlsym(&world, first(&world) as u64, "getppid")), 7);
    assert_ne!(dlsym(&world, first(&world) as u64, "strlen"), 0);
    assert_eq!(dlerror(&world), None);
    assert_eq!(dlsym(&world, GLOBAL, "nowhere_at_all"), 0);
    let error = dlerror(&world);
    assert_eq!(
        error.as_deref(),
        Some("undefined symbol in a fused function: nowhere_at_all")
    );
    assert_eq!(dlerror(&world), None);
}

#[test]
fn next_goes_on_behind_the_calling_module() {
    let world = world();
    let libc_path = CString::new("libc.so.6").expect("no NUL").into_raw() as u64;
    let scope = [
        (0, c"libm.so.6".as_ptr() as u64),
        (first(&world) as u64, 0),
        (&raw const world.modules[1] as u64, 0),
        (0, c"libnowhere.so".as_ptr() as u64),
        (0, libc_path),
    ]
    .map(|(module, path)| ScopeEntry { module, path });
    world.graft.scope = scope.as_ptr() as u64;
    world.graft.scope_count = scope.len() as u64;
    assert_eq!(
        dlsym(&world, NEXT, "getppid"),
        libc::getppid as *const () as u64
    );
    assert_eq!(dlsym(&world, NEXT, "answer"), 0, "its own is no next one");
    assert_ne!(dlsym(&world, NEXT, "only_second"), 0);
    // SAFETY: the module is the graft's.
    let from_second = unsafe { ng_dlsym(NEXT, c"only_second".as_ptr(), &world.modules[1]) };
    assert_eq!(from_second, 0);
}

#[test]
fn what_was_opened_at_run_time_is_initialised_once_after_what_it_needs() {
    let world = world();
    let mut order = 0;
    // SAFETY: the tests' variable.
    unsafe { *(libraries()[1].get("order") as *mut *mut i32) = &mut order };
    let constructor = [libraries()[1].get("constructor")];
    world.modules[1].inits = constructor.as_ptr() as u64;
    world.modules[1].init_count = 1;
    assert_eq!(
        dlopen(&world, "libsecond.so", libc::RTLD_NOLOAD | libc::RTLD_NOW),
        0
    );
    assert_eq!(dlsym(&world, GLOBAL, "only_second"), 0);
    let handle = dlopen(&world, "/callee/libsecond.so", libc::RTLD_NOW);
    assert_eq!(handle, &raw const world.modules[1] as u64);
    assert_eq!(dlopen(&world, "libsecond.so", libc::RTLD_LAZY), handle);
    assert_eq!(
        (order, world.modules[1].initialised.get()),
        (2, crate::abi::MODULE_INITIALISED)
    );
    assert_eq!(call(dlsym(&world, handle, "only_second")), 22);
    assert_eq!(call(dlsym(&world, handle, "answer")), 2, "in what it needs");
    assert_eq!(dlsym(&world, first(&world) as u64, "only_second"), 0);
    // SAFETY: the module is the graft's.
    unsafe {
        assert_eq!(ng_dlclose(handle, first(&world)), 0);
        let mut map: *const [u64; 3] = core::ptr::null();
        let at = (&raw mut map).cast();
        assert_eq!(
            ng_dlinfo(handle, libc::RTLD_DI_LINKMAP, at, first(&world)),
            0
        );
        assert_eq!((*map)[0], world.modules[1].bias);
        assert_eq!(ng_dlinfo(handle, 6, at, first(&world)), -1);
    }
    let error = dlerror(&world).expect("an error");
    assert_eq!(
        error,
        "not known of a fused function's library: /callee/libsecond.so"
    );
}

#[test]
fn other_libraries_are_the_workers_or_not_there() {
    let world = world();
    let libc = dlopen(&world, "libc.so.6", libc::RTLD_NOW);
    assert_eq!(
        dlsym(&world, libc, "getppid"),
        libc::getppid as *const () as u64
    );
    // SAFETY: as above.
    unsafe { assert_eq!(ng_dlclose(libc, first(&world)), 0) };
    // SAFETY: as above.
    let main = unsafe { ng_dlopen(core::ptr::null(), libc::RTLD_NOW, first(&world)) };
    assert_ne!(main, 0);
    assert_eq!(dlopen(&world, "libnowhere.so", libc::RTLD_NOW), 0);
    let error = dlerror(&world).expect("an error");
    assert_eq!(error, "not available in a fused function: libnowhere.so");
    // An error is the thread's.
    assert_eq!(dlopen(&world, "libnowhere.so", libc::RTLD_NOW), 0);
    std::thread::scope(|scope| {
        scope.spawn(|| assert_eq!(dlerror(&world), None));
    });
    assert_eq!(dlsym(&world, libc, "no_such_symbol"), 0);
    let error = dlerror(&world).expect("an error");
    assert!(error.contains("no_such_symbol"), "{error}");
}

#[test]
fn addresses_are_told_by_module_and_symbol() {
    let world = world();
    let answer = dlsym(&world, GLOBAL, "answer");
    let mut info = DlInfo {
        path: 0,
        base: 0,
        symbol: 0,
        address: 0,
    };
    // SAFETY: the structures are locals.
    unsafe {
        assert_eq!(ng_dladdr(answer + 1, &mut info, first(&world)), 1);
        let text = |at: u64| CStr::from_ptr(at as *const c_char).to_str().expect("text");
        assert_eq!(text(info.path), "/callee/libfirst.so");
        assert_eq!((info.base, info.address), (world.modules[0].bias, answer));
        assert!(text(info.symbol).starts_with("answer"));
        let mut extra = 0;
        assert_eq!(
            ng_dladdr1(answer, &mut info, &mut extra, 1, first(&world)),
            1
        );
        // st_value.
        assert_eq!(
            (extra as *const u64).add(1).read() + world.modules[0].bias,
            answer
        );
        assert_eq!(
            ng_dladdr1(answer, &mut info, &mut extra, 2, first(&world)),
            1
        );
        let [bias, name, dynamic] = *(extra as *const [u64; 3]);
        let module = &world.modules[0];
        assert_eq!(
            (bias, name, dynamic),
            (module.bias, module.path, module.dynamic)
        );
        // Inside the image, in no symbol.
        assert_eq!(ng_dladdr(info.base, &mut info, first(&world)), 1);
        assert_eq!((info.symbol, info.address), (0, 0));
        let theirs = libc::getppid as *const () as u64;
        assert_eq!(ng_dladdr(theirs, &mut info, first(&world)), 1);
        assert!(text(info.path).contains("libc"));
    }
}

static SEEN: AtomicU64 = AtomicU64::new(0);

unsafe extern "C" fn collect(info: *mut PhdrInfo, len: usize, data: *mut c_void) -> c_int {
    assert_eq!(len, 64);
    // SAFETY: the structure is whole.
    let info = unsafe { info.read() };
    if info.path == data as u64 {
        assert_ne!((info.phdr, info.phnum), (0, 0));
        assert_eq!(info.tls_module >> 32 != 0, info.tls_data != 0);
        assert_eq!((info.adds, info.subs), (SEEN.load(SeqCst), 0));
        return 99;
    }
    SEEN.store(info.adds, SeqCst);
    0
}

#[test]
fn program_headers_are_the_workers_then_ours() {
    let world = world();
    let path = |index: usize| world.modules[index].path as *mut c_void;
    // SAFETY: as above.
    unsafe {
        assert_eq!(ng_dl_iterate_phdr(collect, path(0), first(&world)), 99);
        // What nobody has opened is not there.
        assert_eq!(ng_dl_iterate_phdr(collect, path(1), first(&world)), 0);
    }
    assert_ne!(dlopen(&world, "libsecond.so", libc::RTLD_NOW), 0);
    // SAFETY: as above.
    unsafe { assert_eq!(ng_dl_iterate_phdr(collect, path(1), first(&world)), 99) };
    assert!(world.worker.imports[Import::DlIteratePhdr as usize] != 0);
}
