//! Compiling small libraries.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;

use nightgraft_patcher::elf::Image;
use tempfile::TempDir;

/// The least that a function library consists of.
pub(crate) const ABI: &str = "
    #include <stdlib.h>
    int faas_init(void) { return atoi(\"0\"); }
    int faas_create_func_worker(void) { return 0; }
    int faas_destroy_func_worker(void) { return 0; }
    int faas_func_call(void) { return 0; }
    void *table[] = { faas_init, table };
";

/// The same without any import, to be linked with `-nostdlib`.
pub(crate) const ALONE: &str = "
    int faas_init(void) { return 0; }
    int faas_create_func_worker(void) { return 0; }
    int faas_destroy_func_worker(void) { return 0; }
    int faas_func_call(void) { return 0; }
    static int own;
    int *pointer = &own;
    void *table[] = { faas_init, table };
";

/// A compiled library, gone when this is.
pub(crate) struct Library {
    #[expect(dead_code, reason = "keeps the folder")]
    folder: TempDir,
    pub(crate) path: PathBuf,
}

impl Library {
    /// # Panics
    /// If the compiler is missing or rejects the source.
    pub(crate) fn new(source: &str, with: &[&str]) -> Library {
        Library::build("gcc", "c", source, with)
    }

    pub(crate) fn build(compiler: &str, language: &str, source: &str, with: &[&str]) -> Library {
        let folder = TempDir::new().unwrap();
        let text = folder.path().join(format!("bar.{language}"));
        std::fs::write(&text, source).unwrap();
        let path = folder.path().join("libbar.so");
        let result = Command::new(compiler)
            .args(["-shared", "-fPIC", "-O1", "-w", "-o"])
            .arg(&path)
            .arg(&text)
            .args(with)
            .output()
            .unwrap_or_else(|error| {
                panic!("{compiler} can't be run ({error}): `cargo xtask setup` installs it")
            });
        let said = String::from_utf8_lossy(&result.stderr);
        assert!(
            result.status.success(),
            "{compiler} rejects {source}:\n{said}"
        );
        Library { folder, path }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    pub(crate) fn image(&self) -> Image {
        let bytes: Arc<[u8]> = self.bytes().into();
        Image::parse(bytes).unwrap()
    }
}

/// A file for the linker: the folder that keeps it and its path.
pub(crate) fn put(name: &str, text: &str) -> (TempDir, String) {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(name);
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

/// A version script, as an option.
pub(crate) fn script(text: &str) -> (TempDir, String) {
    let (folder, path) = put("versions.map", text);
    (folder, format!("-Wl,--version-script={path}"))
}
