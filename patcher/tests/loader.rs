//! The loader on libraries that a compiler made: what it refuses, and that
//! what it loads is what ld.so would have made of it.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: to panic is their verdict"
)]

#[path = "loader/build.rs"]
mod build;
#[path = "loader/host.rs"]
mod host;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use build::{ABI, ALONE, Library};
use host::Host;
use nightgraft_patcher::Refused;
use nightgraft_patcher::analyses::Analyses;
use nightgraft_patcher::effects::{Allowance, Library as Effective, effects};
use nightgraft_patcher::elf::{Image, Symbol};
use nightgraft_patcher::load::{self, Given, GivenTls, Loaded, Meaning, Place, Scope};
use nightgraft_patcher::session::{self, Failure, Function};
use nightgraft_patcher::snapshot::{Map, Memory as _, ProcMemory, Worker};

const BASE: u64 = 0x7f12_3456_7000;
const GIVEN: Given = Given {
    thunks: 0x1111_0000,
    environ: 0x2222,
    modules: 0x3333_0000,
    tls_indices: 0x4444_0000,
    tls: GivenTls {
        get_addr: 0x5551,
        dynamic: 0x5552,
        fixed: 0x5553,
        nowhere: 0x5554,
    },
};

/// The only image of its scope, at this address.
fn alone(base: &u64) -> Place<'_> {
    Place {
        number: 0,
        bases: std::slice::from_ref(base),
    }
}

fn check(library: &Library) -> Result<(), Refused> {
    load::check("/libbar.so", &library.image())?;
    load::check_exports("/libbar.so", &library.image())
}

fn relocate(library: &Library) -> Result<Loaded, Refused> {
    load::relocate("/libbar.so", &library.image(), alone(&BASE), None, &GIVEN)
}

#[test]
fn a_plain_function_library_is_loaded() {
    assert_eq!(check(&Library::new(ABI, &[])), Ok(()));
    let library = Library::new(ALONE, &["-nostdlib"]);
    let loaded = relocate(&library).unwrap();
    assert_eq!(loaded.segments[0].start, BASE);
    assert!(loaded.relro.is_some());
}

#[test]
fn an_export_that_is_no_plain_function_is_refused() {
    let refused = |source: &str, with: &[&str]| {
        let library = Library::new(source, with);
        match check(&library) {
            Err(Refused::UnusableExport { symbol, reason, .. }) => {
                assert_eq!(symbol, "faas_func_call");
                assert_eq!(load::export(&library.image(), "faas_func_call"), None);
                reason
            }
            other => panic!("{other:?}"),
        }
    };
    let rest = ABI.replace("faas_func_call", "other");
    let clones = "__attribute__((target_clones(\"avx2\", \"default\")))\
                  int faas_func_call(void) { return 0; }";
    assert!(refused(&format!("{rest}{clones}"), &[]).contains("indirect"));
    let absolute = "__asm__(\".globl faas_func_call\\nfaas_func_call = 0x1234\");";
    assert!(refused(&format!("{rest}{absolute}"), &[]).contains("absolute"));
    assert!(refused(&format!("{rest}int faas_func_call = 3;"), &[]).contains("not a function"));
    let table = "__asm__(\".globl faas_func_call\\n.data\\nfaas_func_call: .quad 1\\n.text\");";
    assert!(refused(&format!("{rest}{table}"), &[]).contains("not a function"));
    let old = "__asm__(\".symver old, faas_func_call@V1\"); int old(void) { return 0; }";
    let script = build::script("V1 { };");
    assert!(refused(&format!("{rest}{old}"), &[&script.1]).contains("hidden"));
}

#[test]
fn an_export_that_is_not_there_is_missing() {
    let hidden = ABI.replace(
        "int faas_func_call",
        "__attribute__((visibility(\"hidden\"))) int faas_func_call",
    );
    for source in [hidden, ABI.replace("faas_func_call", "other")] {
        let refused = check(&Library::new(&source, &[])).unwrap_err();
        assert_eq!(refused.code(), "missing-export", "{refused}");
    }
}

#[test]
fn a_function_written_in_assembly_is_one() {
    let rest = ABI.replace("faas_func_call", "other");
    let bare = "__asm__(\".globl faas_func_call\\nfaas_func_call: ret\");";
    assert_eq!(check(&Library::new(&format!("{rest}{bare}"), &[])), Ok(()));
}

#[test]
fn what_must_be_aligned_to_more_than_a_huge_page_is_refused() {
    let library = Library::new(ABI, &["-Wl,-z,max-page-size=0x200000"]);
    assert_eq!(check(&library), Ok(()));
    let library = Library::new(ABI, &["-Wl,-z,max-page-size=0x400000"]);
    let refused = check(&library).unwrap_err();
    assert_eq!(refused.code(), "alignment");
    assert!(refused.to_string().contains("4194304"), "{refused}");
}

#[test]
fn an_image_that_is_too_large_is_refused_before_it_is_made() {
    let large = "char large[300 << 20]; char *end = large + (300 << 20) - 8;";
    let library = Library::new(&format!("{ABI}{large}"), &[]);
    assert_eq!(check(&library).unwrap_err().code(), "image-too-large");
    assert_eq!(relocate(&library).unwrap_err().code(), "image-too-large");
}

#[test]
fn a_segment_of_zeros_alone_is_loaded() {
    let script = build::put(
        "zeros.ld",
        "PHDRS { text PT_LOAD FILEHDR PHDRS FLAGS(5); data PT_LOAD FLAGS(6);
                 zeros PT_LOAD FLAGS(6); dynamic PT_DYNAMIC FLAGS(6); stack PT_GNU_STACK FLAGS(6); }
         SECTIONS {
           /DISCARD/ : { *(.note*) *(.comment) *(.gnu.*) *(.eh_frame*) }
           . = SIZEOF_HEADERS;
           .hash : { *(.hash) } :text .dynsym : { *(.dynsym) } :text .dynstr : { *(.dynstr) } :text
           .rela.dyn : { *(.rela*) } :text .text : { *(.text*) *(.rodata*) } :text
           . = ALIGN(0x1000);
           .dynamic : { *(.dynamic) } :data :dynamic .got : { *(.got*) } :data .data : { *(.data*) } :data
           . = ALIGN(0x1000);
           .bss : { *(.bss*) } :zeros
         }",
    );
    let source = format!("{ALONE}static char zeros[20000]; char *end = zeros + 19999;");
    let library = Library::new(
        &source,
        &["-nostdlib", "-Wl,--hash-style=sysv", "-T", &script.1],
    );
    let last = *library.image().segments.last().unwrap();
    assert_eq!((last.file_size, last.writable()), (0, true));
    assert_eq!(check(&library), Ok(()));
    let loaded = relocate(&library).unwrap();
    let zeros = loaded.segments.last().unwrap();
    assert_eq!((zeros.len, zeros.bytes.as_slice()), (0x5000, &[][..]));
}

#[test]
fn a_relocation_of_zeros_writes_no_further_than_it_must() {
    let source = format!("{ALONE}static char zeros[20000]; char *end = zeros + 19999;");
    let library = Library::new(&source, &["-nostdlib"]);
    let mut image = library.image();
    let high = image.high();
    let at = |image: &mut Image, offset| {
        image.dynamic.relocations[0].offset = offset;
    };
    at(&mut image, high - 8);
    let loaded = load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN).unwrap();
    let last = loaded.segments.last().unwrap();
    assert_eq!(last.bytes.len() as u64, last.len);
    for outside in [high - 7, high, u64::MAX - BASE - 3, u64::MAX - 3, 0] {
        at(&mut image, outside);
        let refused = load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN).unwrap_err();
        assert_eq!(refused.code(), "unsupported-relocation", "{outside:#x}");
    }
}

#[test]
fn only_pages_of_its_own_are_sealed() {
    let mut image = Library::new(ALONE, &["-nostdlib"]).image();
    let (start, len) = image.relro.unwrap();
    let text = image
        .segments
        .iter()
        .find(|s| s.executable())
        .unwrap()
        .vaddr;
    for range in [
        (start, len + 0x10_0000),
        (start.wrapping_sub(0x10_0000), 0x2000),
        (text, 0x1000),
        (u64::MAX - 0xfff, u64::MAX),
        (0, u64::MAX),
    ] {
        image.relro = Some(range);
        let refused = load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN).unwrap_err();
        assert_eq!(refused.code(), "broken-image", "{range:x?}");
    }
}

#[test]
fn numbers_that_no_linker_writes_are_survived() {
    let library = Library::new(ALONE, &["-nostdlib"]);
    let mut image = library.image();
    image.dynamic.init_array = Some((image.low(), u64::MAX));
    let refused = load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN).unwrap_err();
    assert_eq!(refused.code(), "broken-image");
    image.dynamic.init_array = Some((u64::MAX - 3, 64));
    assert!(load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN).is_err());
    assert!(load::relocate("/libbar.so", &library.image(), alone(&!0xfff), None, &GIVEN).is_err());
}

/// Every byte of the headers and of the dynamic section, one after the other,
/// set to values that are likely to hurt.
#[test]
fn damaged_libraries_are_refused_or_loaded_but_survived() {
    let library = Library::new(ALONE, &["-nostdlib", "-Wl,-z,pack-relative-relocs"]);
    let (whole, image) = (library.bytes(), library.image());
    assert!(image.dynamic.relocations.iter().any(|r| r.addend.is_none()));
    let dynamic = image.dynamic_vaddr;
    let segment = image
        .segments
        .iter()
        .find(|s| (s.vaddr..s.vaddr + s.file_size).contains(&dynamic))
        .unwrap();
    let dynamic = (dynamic - segment.vaddr + segment.offset) as usize;
    let (mut loaded, mut refused) = (0, 0);
    for at in (0..0x600).chain(dynamic..dynamic + 0x140) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            let Ok(image) = Image::parse(bytes.into()) else {
                refused += 1;
                continue;
            };
            let _ = load::check("/libbar.so", &image);
            match load::relocate("/libbar.so", &image, alone(&BASE), None, &GIVEN) {
                Ok(_) => loaded += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(loaded > 100 && refused > 100, "{loaded} {refused}");
}

/// What building the scope of `callee` in a worker of `caller` says.
fn scope(caller: &Library, callee: &Library) -> Result<(), Refused> {
    let (one, other) = (
        Host::start(&[], &[&caller.path]),
        Host::start(&[], &[&callee.path]),
    );
    let caller = one.read(&caller.path).unwrap();
    let callee = other.read(&callee.path).unwrap();
    Scope::new(&caller, &callee).map(|_| ())
}

#[test]
fn what_takes_part_in_exceptions_is_refused() {
    let caller = Library::new(ABI, &[]);
    let refused = |language: &str, source: &str, with: &[&str]| {
        let callee = Library::build(
            if language == "c" { "gcc" } else { "g++" },
            language,
            source,
            with,
        );
        match scope(&caller, &callee) {
            Err(Refused::Exceptions { symbol, .. }) => symbol,
            other => panic!("{other:?}"),
        }
    };
    let throws = "void f(int i) { if (i) throw i; }";
    assert!(refused("cc", throws, &[]).starts_with("__cxa_"));
    let cleans = "void g(); struct S { ~S(); }; void f() { S s; g(); }  S::~S() {} \
                  __attribute__((noinline)) void g() { __builtin_printf(\"\"); \
                  extern void (*h)() __attribute__((weak)); h(); }";
    assert_eq!(refused("cc", cleans, &[]), "__gxx_personality_v0");
    let grows = "#include <vector>\nint f(std::vector<int> &v) { return v.at(9); }";
    let symbol = refused("cc", grows, &["-fno-exceptions"]);
    assert!(symbol.contains("__throw_"), "{symbol}");
    let cleanup = "void done(int *); void g(void); void (*p)(void); \
                   void f(void) { __attribute__((cleanup(done))) int i = 0; p(); } void done(int *i) {}";
    let symbol = refused("c", cleanup, &["-fexceptions"]);
    assert!(
        symbol == "__gcc_personality_v0" || symbol == "_Unwind_Resume",
        "{symbol}"
    );
    let weak = "extern void _Unwind_Backtrace(void) __attribute__((weak)); \
                void *f(void) { return _Unwind_Backtrace; }";
    assert_eq!(refused("c", weak, &[]), "_Unwind_Backtrace");
}

#[test]
fn cplusplus_without_exceptions_is_not_refused_for_them() {
    let source = "struct A { virtual int f() { return 1; } virtual ~A() {} }; int g(A *a) { return a->f(); }";
    let callee = Library::build("g++", "cc", source, &["-fno-exceptions", "-fno-rtti"]);
    let caller = Library::new(ABI, &[]);
    assert_eq!(scope(&caller, &callee), Ok(()));
    let prints = "#include <ostream>\nvoid f(std::ostream &o) { o << 1; }";
    let callee = Library::build("g++", "cc", prints, &["-fno-exceptions"]);
    match scope(&caller, &callee) {
        // There must be only one, and the program has none.
        Err(Refused::Dependency { needed, .. }) => assert_eq!(needed, "libstdc++.so.6"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_position_in_the_c_library_is_not_shared() {
    let library = |body: &str| {
        Library::new(
            &format!(
                "#include <string.h>\n#include <getopt.h>\n#include <search.h>\n#include <stdlib.h>\n{body}"
            ),
            &[],
        )
    };
    let splits = library("char *f(char *s) { return strtok(s, \",\"); }");
    let other = library("char *f(char *s, char **p) { return strtok_r(s, \",\", p) + rand(); }");
    let options = library("int f(int n, char **v) { return getopt(n, v, \"x\"); }");
    let option = library("int f(void) { return optind; }");
    let table = library("char *f(char *s) { return setstate(s); }");
    match scope(&splits, &table) {
        Err(Refused::UnsupportedImport { symbol, .. }) => assert_eq!(symbol, "setstate"),
        other => panic!("{other:?}"),
    }
    match scope(&options, &option) {
        Err(Refused::SharedState { symbol, .. }) => assert_eq!(symbol, "optind"),
        other => panic!("{other:?}"),
    }
    for (caller, callee) in [
        // Each graft has a position of its own.
        (&splits, &splits),
        (&splits, &other),
        (&other, &splits),
        (&other, &other),
        (&splits, &options),
    ] {
        assert_eq!(scope(caller, callee), Ok(()));
    }
}

#[test]
fn hidden_state_of_the_c_library_shows_as_an_effect() {
    let source = "
        #define _GNU_SOURCE
        #include <fcntl.h>
        #include <sched.h>
        #include <stdlib.h>
        #include <string.h>
        #include <sys/resource.h>
        #include <sys/stat.h>
        #include <unistd.h>
        #include <pwd.h>
        int flags;
        long f(char *p) {
            srand(3); umask(022); setrlimit(RLIMIT_CORE, (struct rlimit *)p); dup2(3, 4); syscall(39);
            sched_setaffinity(0, 8, (cpu_set_t *)p);
            return rand() + (long)strerror(open(p, flags)) + (long)getpwnam(p) + (long)getpwent();
        }";
    let library = Library::new(source, &["-O2", "-D_FORTIFY_SOURCE=2"]);
    let image = library.image();
    let only = [Effective {
        path: "/libbar.so",
        image: &image,
    }];
    let found: Vec<(String, String)> = effects(&only, |_| true, Allowance::NONE)
        .into_iter()
        .map(|e| (e.kind, e.seen[0].imports.join(" ")))
        .collect();
    let expected = [
        ("files", "__open_2 getpwent getpwnam"),
        ("descriptors", "dup2"),
        ("process-settings", "sched_setaffinity setrlimit umask"),
        ("static-results", "getpwnam strerror"),
        ("databases", "getpwent"),
        ("system-calls", "syscall"),
    ];
    let expected: Vec<_> = expected.map(|(k, i)| (k.to_owned(), i.to_owned())).into();
    assert_eq!(found, expected);
}

/// References of every kind to the C library and to itself.
const REFERENCES: &str = "
    #include <math.h>
    #include <stdio.h>
    #include <stdlib.h>
    #include <string.h>
    #include <unistd.h>
    #include <sys/time.h>
    #include <time.h>
    static int own; static int *relative[] = { &own, &own + 1 };
    int exported = 3; int *pointer = &exported; int *behind = &exported + 5;
    extern void nowhere(void) __attribute__((weak)); void (*weak)(void) = nowhere;
    void *(*functions[])() = { (void *)memcpy, (void *)strlen, (void *)malloc, (void *)time, (void *)gettimeofday };
    FILE **streams[] = { &stdout, &stderr };
    static int one(void) { return 1; }
    static int (*resolve(void))(void) { return one; }
    int chosen(void) __attribute__((ifunc(\"resolve\")));
    static int hidden(void) __attribute__((ifunc(\"resolve\")));
    int (*choices[])(void) = { chosen, hidden };
    __attribute__((constructor)) static void started(void) { own++; }
    int use(char *p, int n) {
        memset(p, n, n); memmove(p, p + 1, n); strchr(p, n); printf(p, **relative); fputs(p, stdout);
        fclose(stdin); realpath(p, p); qsort(p, n, n, (void *)use); free(malloc(n)); chosen(); hidden();
        gettimeofday((void *)p, 0); time(0); nowhere && (nowhere(), 0); own = *pointer;
        return timer_create(0, 0, 0) + pthread_cond_wait(p, p) + sched_getaffinity(0, 0, 0) + nftw(p, 0, 0, 0);
    }
";

/// Relocates `library` for the very place where ld.so has put it, and compares
/// every word that a relocation made; how many there are, and how many of
/// them are chosen by a function of the process.
fn compare_with_ld_so(library: &Library, with: &[&str]) -> (usize, usize) {
    let mut host = Host::start(with, &[&library.path]);
    let worker = host.read(&library.path).unwrap();
    let module = worker.function();
    let scope = Scope::new(&worker, &worker).unwrap();
    let base = module.image.low().wrapping_add(module.bias);
    let loaded = load::relocate(
        "/libbar.so",
        &module.image,
        alone(&base),
        Some(&scope),
        &GIVEN,
    )
    .unwrap();
    let memory = ProcMemory::open(host.pid()).unwrap();
    assert_eq!(loaded.bias, module.bias);
    let mut compared = 0;
    for entry in &module.image.dynamic.relocations {
        let at = entry.offset.wrapping_add(module.bias);
        let live = memory.u64(at).unwrap();
        let ours = match loaded.ifuncs.iter().find(|i| i.slot == at) {
            Some(ifunc) => host.call(ifunc.resolver).wrapping_add(ifunc.addend),
            None => {
                let segment = loaded
                    .segments
                    .iter()
                    .find(|s| (s.start..s.start + s.len).contains(&at))
                    .unwrap();
                let from = (at - segment.start) as usize;
                u64::from_le_bytes(segment.bytes[from..from + 8].try_into().unwrap())
            }
        };
        let name = &module.image.symbols[entry.symbol as usize].name;
        assert_eq!(
            ours, live,
            "{with:?}: {entry:x?} of \"{name}\": {ours:#x}, ld.so {live:#x}"
        );
        compared += 1;
    }
    for segment in loaded.segments.iter().filter(|s| !s.writable) {
        let mut live = vec![0; segment.bytes.len()];
        memory.read(segment.start, &mut live).unwrap();
        assert!(live == segment.bytes, "{:#x}", segment.start);
    }
    (compared, loaded.ifuncs.len())
}

#[test]
fn relocations_come_out_as_those_of_ld_so() {
    for with in [
        &["-Wl,-z,now"][..],
        &["-Wl,-z,lazy", "-fcf-protection"],
        &[
            "-fno-plt",
            "-Wl,-z,pack-relative-relocs",
            "-Wl,--hash-style=gnu",
        ],
        &["-Wl,-Bsymbolic", "-Wl,--hash-style=sysv"],
        &["-fvisibility=protected", "-O0"],
    ] {
        let library = Library::new(REFERENCES, with);
        // A program at a fixed address has its own copy of `stdout`.
        for host in [&["-pie", "-fPIE"][..], &["-no-pie", "-fno-pie"]] {
            let (compared, chosen) = compare_with_ld_so(&library, host);
            assert!(
                compared > 30 && chosen > 5,
                "{with:?}: {compared}, {chosen}"
            );
        }
    }
}

#[test]
fn references_without_versions_come_out_as_those_of_ld_so() {
    // Linked without the C library, so none of the imports has a version:
    // some have several definitions there, of which the oldest is found.
    let library = Library::new(REFERENCES, &["-nostdlib"]);
    let image = library.image();
    let mut imports = image.symbols.iter().filter(|s| s.undefined());
    assert!(imports.all(|s| s.version.is_none()));
    let (compared, chosen) = compare_with_ld_so(&library, &[]);
    assert!(compared > 30 && chosen > 5, "{compared}, {chosen}");
}

#[test]
fn a_library_that_was_replaced_on_disk_is_known_by_its_code_or_its_build_id() {
    let source = |number| format!("int f(void) {{ return {number}; }}");
    for option in ["-Wl,--build-id=none", "-Wl,--build-id=sha1"] {
        let old = Library::new(&source(5), &[option]);
        let host = Host::start(&[], &[&old.path]);
        assert_eq!(
            host.read(&old.path).unwrap().function().path,
            old.path.to_str().unwrap()
        );
        let new = Library::new(&source(7), &[option]);
        std::fs::rename(&new.path, &old.path).unwrap();
        let error = host.read(&old.path).unwrap_err();
        assert!(
            error.to_string().contains("replaced on disk"),
            "{option}: {error}"
        );
    }
}

#[test]
fn arguments_are_read_as_they_were_given() {
    let library = Library::new(ABI, &[]);
    let nothing = Path::new("");
    let host = Host::start(&[], &[nothing, &library.path, nothing]);
    let worker = host.read(&library.path).unwrap();
    let path = library.path.to_str().unwrap().as_bytes();
    assert_eq!(worker.arguments[1..], [b"", path, b""]);
    assert!(worker.environment.iter().all(|s| !s.is_empty()));
}

#[test]
fn every_library_of_this_machine_is_read() {
    let mut read = 0;
    for folder in [
        "/usr/lib/x86_64-linux-gnu",
        "/lib/x86_64-linux-gnu",
        "/usr/lib64",
    ] {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for path in entries.map(|e| e.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !name.contains(".so") || !path.is_file() {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            if !bytes.starts_with(b"\x7fELF") {
                continue; // a linker script
            }
            let image = Image::parse(bytes.into())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let span = image.high() - image.low();
            assert!(span > 0 && !image.dynamic.relocations.is_empty(), "{name}");
            let _ = load::check(&name, &image);
            read += 1;
        }
    }
    assert!(read > 10, "only {read} libraries found");
}

/// A worker whose C library is another build: the same but for this change.
fn rebuilt(worker: &Worker, change: impl Fn(&mut Image)) -> Worker {
    let mut worker = worker.clone();
    let libc = worker.modules.iter_mut();
    let libc = { libc }.find(|m| m.short_name() == "libc.so.6").unwrap();
    let mut image = libc.image.as_ref().clone();
    let mut bytes = image.bytes.to_vec();
    *bytes.last_mut().unwrap() ^= 1;
    image.bytes = bytes.into();
    image.build_id = Some(vec![7; 20]);
    change(&mut image);
    libc.image = Arc::new(image);
    worker
}

/// What the callee's import of this name means.
fn meaning(scope: &Scope, name: &str) -> Result<Meaning, Refused> {
    let symbols = &scope.images()[0].image.symbols;
    let index = symbols.iter().position(|s| s.name == name).unwrap();
    scope.meaning(0, index as u32, false)
}

#[test]
fn another_build_of_a_versioned_library_is_bound_by_version() {
    let library = Library::new(
        &format!("#include <unistd.h>\n{ABI} int (*pid)(void) = getpid;"),
        &[],
    );
    let host = Host::start(&[], &[&library.path]);
    let worker = host.read(&library.path).unwrap();
    let same = Scope::new(&worker, &worker).unwrap();
    let Ok(Meaning::At(here)) = meaning(&same, "getpid") else {
        panic!("{:?}", meaning(&same, "getpid"));
    };
    let each = |name: &str, change: &dyn Fn(&mut Symbol)| {
        rebuilt(&worker, |image| {
            let all = image.symbols.iter_mut();
            all.filter(|s| s.name == name).for_each(change);
        })
    };
    let moved = each("getpid", &|s| s.value += 0x40);
    let scope = Scope::new(&moved, &worker).unwrap();
    assert_eq!(meaning(&scope, "getpid"), Ok(Meaning::At(here + 0x40)));
    assert_eq!(
        scope.library_function("getpid"),
        Ok(Meaning::At(here + 0x40))
    );
    // An older one: it has the name, but not in the version that is wanted.
    for version in ["GLIBC_2.0", "GLIBC_PRIVATE"] {
        let old = each("getpid", &|s| s.version = Some(version.into()));
        let refused = meaning(&Scope::new(&old, &worker).unwrap(), "getpid").unwrap_err();
        assert_eq!(refused.code(), "too-old");
        let text = refused.to_string();
        assert!(
            text.contains("getpid@GLIBC_2.2.5") && text.contains("libc.so.6"),
            "{text}"
        );
    }
    // What promises nothing is not shared, even where both have it.
    let private = |worker: &Worker| {
        let mut worker = rebuilt(worker, |image| {
            let all = image.symbols.iter_mut();
            all.filter(|s| s.name == "getpid")
                .for_each(|s| s.version = Some("GLIBC_PRIVATE".into()));
        });
        let library = worker.library;
        let module = &mut worker.modules[library];
        let mut image = module.image.as_ref().clone();
        let all = image.symbols.iter_mut();
        all.filter(|s| s.name == "getpid")
            .for_each(|s| s.version = Some("GLIBC_PRIVATE".into()));
        module.image = Arc::new(image);
        worker
    };
    let callee = private(&worker);
    let caller = rebuilt(&callee, |image| image.build_id = Some(vec![8; 20]));
    let refused = meaning(&Scope::new(&caller, &callee).unwrap(), "getpid").unwrap_err();
    assert_eq!(refused.code(), "too-old");
}

#[test]
fn another_executable_is_no_obstacle_where_it_only_stands_in_for_a_library() {
    let library = Library::new(
        &format!(
            "#include <stdio.h>\n{ABI} FILE **out = &stdout; int mine(void); int (*m)(void) = mine;"
        ),
        &[],
    );
    // Without -fPIE it copies what it uses of the C library.
    let provides = ["-fno-pie", "-no-pie", "-include", "stdio.h", "-rdynamic"];
    let with = [
        &provides[..],
        &["-Dmain=mine(void){fflush(stdout);return 7;}int/**/main"],
    ]
    .concat();
    let one = Host::start(&with, &[&library.path]);
    let two = Host::start(&[&with[..], &["-O2"]].concat(), &[&library.path]);
    let (caller, callee) = (
        one.read(&library.path).unwrap(),
        two.read(&library.path).unwrap(),
    );
    let executable = caller.executable();
    let copies = &executable.image.symbols;
    let copy = copies.iter().find(|s| s.name == "stdout").unwrap();
    assert!(!copy.undefined(), "a copy");
    let scope = Scope::new(&caller, &callee).unwrap();
    assert_eq!(
        meaning(&scope, "stdout"),
        Ok(Meaning::At(copy.value.wrapping_add(executable.bias)))
    );
    // What is its own is another's.
    let refused = meaning(&scope, "mine").unwrap_err();
    assert_eq!(refused.code(), "different-library");
}

/// What fusing the function of `callee` into `caller` is refused for.
fn refusal(caller: &Host, callee: i32, libraries: [&Path; 2]) -> Refused {
    let function = |pid: i32, library| Function {
        pid,
        start_time: Map::all(pid).unwrap().0,
        library,
    };
    let planned = session::explain(
        function(caller.pid(), libraries[0]),
        function(callee, libraries[1]),
        "Bar",
        Allowance::default().into(),
        &Analyses::default(),
    );
    match planned {
        Err(Failure::Refused(refused)) => refused,
        other => panic!("{other:?}"),
    }
}

/// One that calls another function, so that its sites are no obstacle.
const CALLER: &str = r#"
    typedef int (*invoke)(void *, const char *, const char *, unsigned long, const char **,
                          unsigned long *);
    static invoke call; static void *context;
    int faas_init(void) { return 0; }
    int faas_create_func_worker(void *c, invoke i, void *a, void **h) {
        call = i; context = c; *h = 0; return 0;
    }
    int faas_destroy_func_worker(void *h) { return 0; }
    int faas_func_call(void *h, const char *in, unsigned long n) {
        const char *out; unsigned long length;
        return call(context, "Bar", in, n, &out, &length) + (int)length;
    }
"#;

#[test]
fn a_worker_on_another_c_library_is_refused() {
    let caller = Library::new(CALLER, &[]);
    let callee = Library::build("musl-gcc", "c", ABI, &[]);
    let one = Host::start(&[], &[&caller.path]);
    let other = Host::compiled("musl-gcc", &[], &[&callee.path]);
    let refused = refusal(&one, other.pid(), [&caller.path, &callee.path]);
    assert_eq!(refused.code(), "other-libc");
    let text = refused.to_string();
    assert!(
        text.contains("musl") && text.contains("libc.so.6"),
        "{text}"
    );
}

#[test]
fn a_worker_of_another_machine_is_refused() {
    let caller = Library::new(CALLER, &[]);
    let one = Host::start(&[], &[&caller.path]);
    let folder = tempfile::tempdir().unwrap();
    let (source, program) = (
        folder.path().join("a.s"),
        folder.path().join("func_worker_v1"),
    );
    std::fs::write(
        &source,
        ".globl _start\n_start: mov $29, %eax\nint $0x80\njmp _start\n",
    )
    .unwrap();
    let done = Command::new("gcc")
        .args(["-m32", "-nostdlib", "-static", "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(done.success());
    let mut other = Command::new(&program).spawn().unwrap();
    let pid = i32::try_from(other.id()).unwrap();
    // It has its program once it has left this one's.
    while std::fs::read_link(format!("/proc/{pid}/exe")).unwrap() != program {
        std::thread::yield_now();
    }
    let refused = refusal(&one, pid, [&caller.path, Path::new("/libbar.so")]);
    other.kill().unwrap();
    other.wait().unwrap();
    assert_eq!(refused.code(), "other-machine");
    assert!(refused.to_string().contains("func_worker_v1"), "{refused}");
}
