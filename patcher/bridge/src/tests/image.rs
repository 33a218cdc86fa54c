//! The image itself, as the patcher builds it, loaded by the dynamic linker.
//! What unwinds through it can't be seen in the library: there, Rust's own
//! unwinding is compiled in.

use std::ffi::{CString, c_void};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

include!("../../image_flags.rs");

/// An opened shared object.
pub(crate) struct Library(usize);

impl Library {
    fn open(path: &Path, mode: i32) -> Library {
        let name = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: a library of the tests'.
        let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | mode) };
        assert!(!handle.is_null(), "{} can't be opened", path.display());
        Library(handle as usize)
    }

    /// Address of a symbol.
    pub(crate) fn get(&self, name: &str) -> u64 {
        let symbol = CString::new(name).expect("no NUL");
        // SAFETY: a lookup in an open library.
        let address = unsafe { libc::dlsym(self.0 as *mut c_void, symbol.as_ptr()) };
        assert!(!address.is_null(), "{name} is not there");
        address as u64
    }

    /// Its `struct link_map`, which the handle is.
    pub(crate) fn link_map(&self) -> u64 {
        self.0 as u64
    }

    /// A variable of the tests' C++.
    pub(crate) fn int(&self, name: &str) -> i32 {
        // SAFETY: an `int` of the library's.
        unsafe { (self.get(name) as *const i32).read_volatile() }
    }
}

fn run(command: &mut Command) {
    let status = command.status().expect("a compiler");
    assert!(status.success(), "{command:?}");
}

struct Built {
    bridge: Library,
    functions: Library,
    libraries: [Library; 2],
    path: PathBuf,
    _dir: tempfile::TempDir,
}

static BUILT: LazyLock<Built> = LazyLock::new(|| {
    let dir = tempfile::tempdir().expect("a directory");
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let (image, functions) = (
        dir.path().join("bridge.so"),
        dir.path().join("functions.so"),
    );
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    run(Command::new(rustc)
        .args(IMAGE_FLAGS)
        .arg("-o")
        .arg(&image)
        .arg(sources.join("lib.rs")));
    run(Command::new("g++")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .arg(&functions)
        .arg(sources.join("tests/functions.cc")));
    let shared = |name: &str, more: &[&str]| {
        let path = dir.path().join(format!("lib{name}.so"));
        run(Command::new("gcc")
            .args(["-shared", "-fPIC", "-O1", "-Wl,--hash-style=both", "-o"])
            .arg(&path)
            .arg(format!("-Wl,-soname,lib{name}.so"))
            .arg(format!("-D{}", name.to_uppercase()))
            .arg(sources.join("tests/libraries.c"))
            .arg("-L")
            .arg(dir.path())
            .args(more));
        Library::open(&path, libc::RTLD_LOCAL)
    };
    let script = format!(
        "-Wl,--version-script={}",
        sources.join("tests/libraries.map").display()
    );
    let first = shared("first", &[&script]);
    Built {
        libraries: [first, shared("second", &["-Wl,--no-as-needed", "-lfirst"])],
        functions: Library::open(&functions, libc::RTLD_GLOBAL),
        bridge: Library::open(&image, libc::RTLD_LOCAL),
        path: image,
        _dir: dir,
    }
});

/// The image.
pub(crate) fn bridge() -> &'static Library {
    &BUILT.bridge
}

/// Where its file is.
pub(crate) fn path() -> &'static Path {
    &BUILT.path
}

/// The tests' C++ functions.
pub(crate) fn functions() -> &'static Library {
    &BUILT.functions
}

/// Two libraries in C that the program's global scope does not have.
pub(crate) fn libraries() -> &'static [Library; 2] {
    &BUILT.libraries
}
