//! Which engine a worker belongs to, and so what its function is called.
//!
//! A worker knows its function's number only; the name is in the engine's
//! configuration, and a node may run several engines that number differently.
//! Evidence, strongest first; the first kind that singles out any engine ends
//! the search:
//!
//! 1. worker and engine meet in the same directory (device and inode, since
//!    each may name it by a path of its own);
//! 2. the worker connects to the engine's TCP port;
//! 3. both name the directory alike (and it is not known to be two);
//! 4. nothing: all engines remain.
//!
//! Of those that remain, the ones without such a function id drop out. If they
//! still disagree on the name, the worker's log file (`<Name>_worker_<n>.stdout`)
//! may settle it; else the name is unknown and the report says why. This is
//! pure: values in, values out.

use std::path::{Path, PathBuf};

use super::config::FuncEntry;

/// An engine or gateway.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Engine {
    /// Its pid.
    pub pid: i32,
    /// The directory where it meets its workers.
    pub ipc_path: PathBuf,
    /// Device and inode of that directory.
    pub ipc_identity: Option<(u64, u64)>,
    /// TCP port for its workers.
    pub tcp_port: Option<u16>,
    /// Its functions; `None` where its configuration can't be read.
    pub functions: Option<Vec<FuncEntry>>,
}

/// What a worker says of the engine that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Clues {
    /// `FAAS_FUNC_ID`.
    pub func_id: u32,
    /// `FAAS_ROOT_PATH_FOR_IPC`, or nightcore's default.
    pub ipc_path: PathBuf,
    /// Device and inode of that directory.
    pub ipc_identity: Option<(u64, u64)>,
    /// `FAAS_ENGINE_TCP_PORT`.
    pub tcp_port: Option<u16>,
    /// The function's name by the name of the worker's log file.
    pub log_name: Option<String>,
}

/// What was concluded.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Match {
    /// The engine; `None` where it is not known or not clear.
    pub engine: Option<i32>,
    /// The function's name; `None` where it is not known or not clear.
    pub name: Option<String>,
    /// What is unclear, completing "worker N: …".
    pub note: Option<String>,
}

/// Matches one worker.
#[must_use]
pub fn find_engine(clues: &Clues, engines: &[Engine]) -> Match {
    let mut left = candidates(clues, engines);
    left.retain(|engine| match &engine.functions {
        Some(functions) => functions.iter().any(|f| f.id == clues.func_id),
        None => true,
    });
    let from_log = || clues.log_name.clone();
    let named: Vec<(&Engine, &str)> = left
        .iter()
        .filter_map(|engine| Some((*engine, name_in(engine, clues.func_id)?)))
        .collect();
    match (left.as_slice(), named.as_slice()) {
        ([], _) => Match {
            engine: None,
            name: from_log(),
            note: (!engines.is_empty()).then(|| {
                format!(
                    "no engine on this node has a function with id {}",
                    clues.func_id
                )
            }),
        },
        ([engine], []) => Match {
            engine: Some(engine.pid),
            name: from_log(),
            note: None,
        },
        ([engine], [(_, name)]) => contradicted(engine.pid, name, clues.log_name.as_deref()),
        (_, named) => several(&left, named, clues),
    }
}

/// One engine, but the log file may tell of another.
fn contradicted(engine: i32, name: &str, log_name: Option<&str>) -> Match {
    let note = log_name
        .filter(|log_name| *log_name != name)
        .map(|log_name| {
            format!(
                "its function is {name} by the configuration of engine {engine} as it is now, but \
             {log_name} by the name of its log file: was the configuration changed?"
            )
        });
    // The name that the engine dispatches by is the one that it started with,
    // which is the launcher's source for the log file's name.
    let name = log_name.unwrap_or(name).to_owned();
    Match {
        engine: Some(engine),
        name: Some(name),
        note,
    }
}

fn several(left: &[&Engine], named: &[(&Engine, &str)], clues: &Clues) -> Match {
    let says = |wanted: &str| -> Vec<&(&Engine, &str)> {
        named.iter().filter(|(_, name)| *name == wanted).collect()
    };
    if let Some(log_name) = &clues.log_name
        && let [(engine, _)] = says(log_name).as_slice()
    {
        return Match {
            engine: Some(engine.pid),
            name: Some(log_name.clone()),
            note: None,
        };
    }
    let agreed = match named {
        [(_, first), rest @ ..] if rest.iter().all(|(_, name)| name == first) => Some(*first),
        _ => None,
    };
    let pids: Vec<String> = left.iter().map(|engine| engine.pid.to_string()).collect();
    let note = match agreed {
        Some(name) => format!(
            "it may belong to any of the engines {}, which all call function {} {name}",
            pids.join(", "),
            clues.func_id
        ),
        None => {
            let names: Vec<String> = named
                .iter()
                .map(|(engine, name)| format!("{name} (engine {})", engine.pid))
                .collect();
            format!(
                "its engine is not clear, and function {} is {}",
                clues.func_id,
                if names.is_empty() {
                    "known to none".to_owned()
                } else {
                    names.join(" or ")
                }
            )
        }
    };
    let name = clues.log_name.clone().or_else(|| agreed.map(str::to_owned));
    Match {
        engine: None,
        name,
        note: Some(note),
    }
}

fn candidates<'a>(clues: &Clues, engines: &'a [Engine]) -> Vec<&'a Engine> {
    let by = |keep: &dyn Fn(&Engine) -> bool| -> Vec<&'a Engine> {
        engines.iter().filter(|engine| keep(engine)).collect()
    };
    let same_directory = by(&|e| e.ipc_identity.is_some() && e.ipc_identity == clues.ipc_identity);
    if !same_directory.is_empty() {
        return same_directory;
    }
    let same_port = by(&|e| e.tcp_port.is_some() && e.tcp_port == clues.tcp_port);
    if !same_port.is_empty() {
        return same_port;
    }
    let two_directories = |e: &Engine| e.ipc_identity.is_some() && clues.ipc_identity.is_some();
    let same_path = by(&|e| e.ipc_path == clues.ipc_path && !two_directories(e));
    if !same_path.is_empty() {
        return same_path;
    }
    by(&|_| true)
}

fn name_in(engine: &Engine, func_id: u32) -> Option<&str> {
    let functions = engine.functions.as_ref()?;
    functions
        .iter()
        .find(|f| f.id == func_id)
        .map(|f| f.name.as_str())
}

/// The function's name in the name of a worker's log file,
/// `<Name>_worker_<n>.stdout` with the worker's own number.
#[must_use]
pub fn name_in_log(path: &Path, fprocess_id: u32) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let name = file.strip_suffix(&format!("_worker_{fprocess_id}.stdout"))?;
    let printable = name.bytes().all(|b| b.is_ascii_graphic());
    (!name.is_empty() && printable).then(|| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, id: u32) -> FuncEntry {
        FuncEntry {
            name: name.to_owned(),
            id,
            min_workers: None,
            max_workers: None,
        }
    }

    fn engine(pid: i32, functions: &[(&str, u32)]) -> Engine {
        Engine {
            pid,
            ipc_path: PathBuf::from(format!("/dev/shm/ipc{pid}")),
            ipc_identity: Some((1, u64::try_from(pid).unwrap())),
            tcp_port: None,
            functions: Some(
                functions
                    .iter()
                    .map(|(name, id)| entry(name, *id))
                    .collect(),
            ),
        }
    }

    fn clues(func_id: u32) -> Clues {
        Clues {
            func_id,
            ipc_path: PathBuf::from("/elsewhere"),
            ipc_identity: None,
            tcp_port: None,
            log_name: None,
        }
    }

    fn found(engine: i32, name: &str) -> Match {
        Match {
            engine: Some(engine),
            name: Some(name.to_owned()),
            note: None,
        }
    }

    #[test]
    fn the_directory_decides_though_its_path_misleads() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        let worker = Clues {
            ipc_identity: Some((1, 20)),
            ipc_path: PathBuf::from("/dev/shm/ipc10"),
            ..clues(1)
        };
        assert_eq!(find_engine(&worker, &engines), found(20, "Baz"));
    }

    #[test]
    fn the_same_path_in_two_directories_is_no_evidence() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        let worker = Clues {
            ipc_identity: Some((9, 9)),
            ipc_path: PathBuf::from("/dev/shm/ipc10"),
            ..clues(1)
        };
        let found = find_engine(&worker, &engines);
        assert_eq!((found.engine, found.name), (None, None));
    }

    #[test]
    fn the_port_decides_where_the_directory_is_not_seen() {
        let mut engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        engines[1].tcp_port = Some(10_007);
        let worker = Clues {
            tcp_port: Some(10_007),
            ..clues(1)
        };
        assert_eq!(find_engine(&worker, &engines), found(20, "Baz"));
    }

    #[test]
    fn the_path_decides_where_the_directory_is_not_seen() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        let worker = Clues {
            ipc_path: PathBuf::from("/dev/shm/ipc20"),
            ..clues(1)
        };
        assert_eq!(find_engine(&worker, &engines), found(20, "Baz"));
    }

    #[test]
    fn the_function_id_decides_where_nothing_else_does() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 2)])];
        assert_eq!(find_engine(&clues(2), &engines), found(20, "Baz"));
    }

    #[test]
    fn ambiguity_is_reported_and_not_guessed_away() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        let found = find_engine(&clues(1), &engines);
        assert_eq!((found.engine, found.name), (None, None));
        assert_eq!(
            found.note.unwrap(),
            "its engine is not clear, and function 1 is Foo (engine 10) or Baz (engine 20)"
        );
    }

    #[test]
    fn the_log_file_s_name_settles_an_ambiguity() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Baz", 1)])];
        let worker = Clues {
            log_name: Some("Baz".to_owned()),
            ..clues(1)
        };
        assert_eq!(find_engine(&worker, &engines), found(20, "Baz"));
    }

    #[test]
    fn engines_that_agree_leave_the_name_clear() {
        let engines = [engine(10, &[("Foo", 1)]), engine(20, &[("Foo", 1)])];
        let found = find_engine(&clues(1), &engines);
        assert_eq!((found.engine, found.name.as_deref()), (None, Some("Foo")));
        assert!(found.note.unwrap().contains("10, 20"));
    }

    #[test]
    fn an_edited_configuration_is_noticed() {
        let worker = Clues {
            log_name: Some("Foo".to_owned()),
            ..clues(1)
        };
        let found = find_engine(&worker, &[engine(10, &[("Renamed", 1)])]);
        assert_eq!(
            found.name.as_deref(),
            Some("Foo"),
            "the engine has not read it again"
        );
        assert!(found.note.unwrap().contains("Renamed"));
    }

    #[test]
    fn without_any_engine_the_log_file_is_left() {
        let worker = Clues {
            log_name: Some("Foo".to_owned()),
            ..clues(1)
        };
        let expected = Match {
            engine: None,
            name: Some("Foo".to_owned()),
            note: None,
        };
        assert_eq!(find_engine(&worker, &[]), expected);
        assert_eq!(find_engine(&clues(1), &[]), Match::default());
    }

    #[test]
    fn a_function_that_no_engine_has_is_noted() {
        let found = find_engine(&clues(7), &[engine(10, &[("Foo", 1)])]);
        assert_eq!((found.engine, found.name), (None, None));
        assert!(found.note.unwrap().contains("id 7"));
    }

    #[test]
    fn log_names_are_believed_only_with_the_worker_s_own_number() {
        let name = |path: &str| name_in_log(Path::new(path), 3);
        assert_eq!(name("/out/Foo_worker_3.stdout").as_deref(), Some("Foo"));
        assert_eq!(name("/out/Foo_worker_4.stdout"), None);
        assert_eq!(name("/out/_worker_3.stdout"), None);
        assert_eq!(name("pipe:[123]"), None);
        assert_eq!(name("/out/\u{1b}[2J_worker_3.stdout"), None);
    }
}
