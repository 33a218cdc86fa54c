//! A program that has loaded libraries with the machine's own ld.so, to be
//! read from outside like a worker.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use nightgraft_patcher::snapshot::{SnapshotError, Worker};
use tempfile::TempDir;

/// Loads its arguments, says so, then calls what it is told to.
const SOURCE: &str = r#"
    #include <dlfcn.h>
    #include <stdio.h>
    int main(int argc, char **argv) {
        for (int i = 1; i < argc; i++)
            if (!dlopen(argv[i], RTLD_NOW)) {
                fprintf(stderr, "%s\n", dlerror());
                return 1;
            }
        puts("ready");
        fflush(stdout);
        unsigned long function;
        while (scanf("%lx", &function) == 1) {
            printf("%lx\n", ((unsigned long (*)(void))function)());
            fflush(stdout);
        }
        return 0;
    }
"#;

pub(crate) struct Host {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    _folder: TempDir,
}

impl Host {
    /// Starts a program that was compiled `with` these options, with
    /// `arguments` as the libraries to load.
    ///
    /// # Panics
    /// If it does not compile, or one of the libraries cannot be loaded.
    pub(crate) fn start(with: &[&str], arguments: &[&Path]) -> Host {
        Host::compiled("gcc", with, arguments)
    }

    /// The same by another compiler.
    pub(crate) fn compiled(compiler: &str, with: &[&str], arguments: &[&Path]) -> Host {
        let folder = TempDir::new().unwrap();
        let (source, program) = (folder.path().join("host.c"), folder.path().join("host"));
        std::fs::write(&source, SOURCE).unwrap();
        let done = Command::new(compiler)
            .args(with)
            .arg("-o")
            .args([&program, &source])
            .status()
            .unwrap();
        assert!(done.success());
        let mut child = Command::new(&program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let mut host = Host {
            child,
            input,
            output: BufReader::new(output),
            _folder: folder,
        };
        assert_eq!(host.line(), "ready");
        host
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line.trim().to_owned()
    }

    pub(crate) fn pid(&self) -> i32 {
        self.child.id().try_into().unwrap()
    }

    /// Reads the program, whose function is in `library`.
    pub(crate) fn read(&self, library: &Path) -> Result<Worker, SnapshotError> {
        Worker::read(self.pid(), library)
    }

    /// Has the program call a function of its own without arguments.
    pub(crate) fn call(&mut self, function: u64) -> u64 {
        writeln!(self.input, "{function:x}").unwrap();
        u64::from_str_radix(&self.line(), 16).unwrap()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
