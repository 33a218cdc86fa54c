//! A proc file system on disk.

use std::fs;
use std::path::{Path, PathBuf};

use crate::discover::ProcRoot;

/// A directory that looks like `/proc`.
pub(crate) struct FakeProc {
    dir: tempfile::TempDir,
}

/// One process in it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FakeProcess<'a> {
    pub(crate) pid: i32,
    pub(crate) ppid: i32,
    pub(crate) argv: &'a [&'a str],
    pub(crate) env: &'a [&'a str],
    pub(crate) cgroup: &'a str,
    pub(crate) tracer: i32,
    pub(crate) start_time: u64,
}

impl Default for FakeProcess<'_> {
    fn default() -> Self {
        Self {
            pid: 1,
            ppid: 0,
            argv: &[],
            env: &[],
            cgroup: "0::/\n",
            tracer: 0,
            start_time: 1_000,
        }
    }
}

impl FakeProc {
    pub(crate) fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
        }
    }

    pub(crate) fn root(&self) -> ProcRoot {
        ProcRoot::at(self.dir.path())
    }

    pub(crate) fn path(&self, pid: i32) -> PathBuf {
        self.dir.path().join(pid.to_string())
    }

    /// Lays out one process. Its root is the directory `root` in it.
    pub(crate) fn add(&self, process: &FakeProcess<'_>) -> PathBuf {
        let FakeProcess {
            pid,
            ppid,
            argv,
            env,
            cgroup,
            tracer,
            start_time,
        } = *process;
        let path = self.path(pid);
        fs::create_dir_all(path.join("root")).unwrap();
        fs::create_dir_all(path.join("fd")).unwrap();
        let nul = |parts: &[&str]| {
            parts
                .iter()
                .flat_map(|part| [part, "\0"])
                .collect::<String>()
        };
        fs::write(path.join("cmdline"), nul(argv)).unwrap();
        fs::write(path.join("environ"), nul(env)).unwrap();
        fs::write(path.join("cgroup"), cgroup).unwrap();
        let stat = format!(
            "{pid} (worker) S {ppid} {pid} {pid} 0 -1 0 0 0 0 0 0 0 0 0 20 0 2 0 {start_time} 0\n"
        );
        fs::write(path.join("stat"), stat).unwrap();
        let status = format!("Name:\tworker\nTracerPid:\t{tracer}\nNSpid:\t{pid}\t8\n");
        fs::write(path.join("status"), status).unwrap();
        path
    }

    /// Writes a file beneath a process's root.
    pub(crate) fn write(&self, pid: i32, path: &str, text: &str) {
        let path = self
            .path(pid)
            .join("root")
            .join(path.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    pub(crate) fn link(&self, pid: i32, name: &str, target: &str) {
        let path = self.path(pid).join(name);
        let _ = fs::remove_file(&path);
        std::os::unix::fs::symlink(Path::new(target), path).unwrap();
    }

    /// A node with one engine (100), Foo with workers 11 and 12, Bar with
    /// worker 21, Baz with none and Go's worker 31 of Gopher.
    pub(crate) fn example() -> Self {
        let fake = Self::new();
        fake.add(&FakeProcess {
            pid: 100,
            argv: &[
                "/nightcore/engine",
                "--func_config_file=/etc/func_config.json",
            ],
            ..FakeProcess::default()
        });
        fake.write(
            100,
            "/etc/func_config.json",
            r#"[{"funcName":"Foo","funcId":1,"minWorkers":2,"maxWorkers":4},
                {"funcName":"Bar","funcId":2},{"funcName":"Baz","funcId":3},
                {"funcName":"Gopher","funcId":4}]"#,
        );
        let group = format!("0::/docker/{}\n", "c".repeat(64));
        for (pid, func, fprocess, library) in [
            (11, 1, 0, "/functions/libfoo.so"),
            (12, 1, 1, "/functions/libfoo.so"),
            (21, 2, 0, "/functions/libbar.so"),
        ] {
            let id = format!("FAAS_FUNC_ID={func}");
            let number = format!("FAAS_FPROCESS_ID={fprocess}");
            let client = format!("FAAS_CLIENT_ID={pid}");
            fake.add(&FakeProcess {
                pid,
                argv: &["/nightcore/func_worker_v1", library],
                env: &["PATH=/bin", &id, &number, &client],
                cgroup: &group,
                ..FakeProcess::default()
            });
        }
        fake.add(&FakeProcess {
            pid: 30,
            argv: &["/nightcore/launcher", "--func_id=4", "--fprocess_mode=go"],
            ..FakeProcess::default()
        });
        fake.add(&FakeProcess {
            pid: 31,
            ppid: 30,
            argv: &["/functions/gopher"],
            env: &["FAAS_FUNC_ID=4", "FAAS_FPROCESS_ID=0", "FAAS_CLIENT_ID=9"],
            ..FakeProcess::default()
        });
        fake
    }
}
