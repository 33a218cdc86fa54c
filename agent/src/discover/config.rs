//! nightcore's command lines and `func_config.json`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::proc::{Process, basename};

/// Largest configuration file that is read, in bytes.
const MAX_CONFIG: u64 = 4 << 20;
/// Longest function name that is believed, in bytes.
const MAX_NAME: usize = 256;
/// Where nightcore's processes meet unless they are told otherwise.
pub const DEFAULT_IPC_PATH: &str = "/dev/shm/faas_ipc";

/// What a process of nightcore's is, by its command line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Dispatches calls on this node.
    Engine,
    /// Takes requests from outside.
    Gateway,
    /// Starts one function's workers.
    Launcher,
}

/// The role of a process, where it has one.
#[must_use]
pub fn role(argv: &[OsString]) -> Option<Role> {
    match basename(argv.first()?).to_str()? {
        "engine" if flag(argv, "func_config_file").is_some() => Some(Role::Engine),
        "gateway" if flag(argv, "func_config_file").is_some() => Some(Role::Gateway),
        "launcher" if flag(argv, "func_id").is_some() => Some(Role::Launcher),
        _ => None,
    }
}

/// The function library on a worker's command line; `None` where it is not
/// `func_worker_v1` that runs.
#[must_use]
pub fn library(argv: &[OsString]) -> Option<PathBuf> {
    let program = argv
        .iter()
        .position(|arg| basename(arg) == "func_worker_v1")?;
    // A wrapper may stand before it (an emulator, a loader), but a shell's
    // script is one argument and names no program of its own.
    let positional: Vec<&OsString> = argv[program + 1..]
        .iter()
        .filter(|arg| !arg.as_bytes().starts_with(b"-"))
        .collect();
    let named_so = |arg: &&&OsString| basename(arg).to_string_lossy().contains(".so");
    let library = positional.iter().find(named_so).or(positional.last())?;
    Some(PathBuf::from(library))
}

/// The value of a flag, in any of the ways that nightcore's flag library
/// takes: `--name=value`, `-name=value`, `--name value`. The last one counts.
#[must_use]
pub fn flag<'a>(argv: &'a [OsString], name: &str) -> Option<&'a OsStr> {
    let mut found = None;
    let mut args = argv.iter().skip(1).peekable();
    while let Some(arg) = args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            break;
        }
        let Some(bare) = bytes
            .strip_prefix(b"--")
            .or_else(|| bytes.strip_prefix(b"-"))
        else {
            continue;
        };
        let Some(rest) = bare.strip_prefix(name.as_bytes()) else {
            continue;
        };
        if let Some(value) = rest.strip_prefix(b"=") {
            found = Some(OsStr::from_bytes(value));
        } else if rest.is_empty()
            && let Some(value) = args.peek()
        {
            found = Some(value);
        }
    }
    found
}

/// The value of a flag as a number.
#[must_use]
pub fn number_flag(argv: &[OsString], name: &str) -> Option<i64> {
    flag(argv, name)?.to_str()?.parse().ok()
}

/// One function of the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FuncEntry {
    /// `funcName`.
    pub name: String,
    /// `funcId`, 1 or more.
    pub id: u32,
    /// `minWorkers`.
    pub min_workers: Option<i64>,
    /// `maxWorkers`.
    pub max_workers: Option<i64>,
}

/// Reads the configuration that an engine or gateway was started with, from
/// within its own root.
///
/// # Errors
/// A sentence that says which file of which process, and what is wrong.
pub fn read(process: &Process, argv: &[OsString]) -> Result<Vec<FuncEntry>, String> {
    let named = Path::new(flag(argv, "func_config_file").unwrap_or_default());
    let fail = |cause: &dyn std::fmt::Display| {
        format!(
            "can't read {} of process {}: {cause}",
            named.display(),
            process.pid()
        )
    };
    let path = process.absolute(named).map_err(|error| fail(&error))?;
    let bytes = process
        .read_in_root(&path, MAX_CONFIG)
        .map_err(|error| fail(&error))?;
    parse(&bytes).map_err(|error| fail(&error))
}

/// Parses `func_config.json`. As in nightcore, one bad entry spoils the file:
/// an engine that had read it would not be running.
fn parse(bytes: &[u8]) -> Result<Vec<FuncEntry>, String> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    let items = value.as_array().ok_or("it is not an array of functions")?;
    let mut entries: Vec<FuncEntry> = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let entry = entry(item).map_err(|what| format!("entry {index}: {what}"))?;
        if let Some(twin) = entries
            .iter()
            .find(|e| e.id == entry.id || e.name == entry.name)
        {
            return Err(format!(
                "entry {index}: {} [{}] repeats the name or id of {} [{}]",
                entry.name, entry.id, twin.name, twin.id
            ));
        }
        entries.push(entry);
    }
    Ok(entries)
}

fn entry(item: &Value) -> Result<FuncEntry, String> {
    let name = item
        .get("funcName")
        .and_then(Value::as_str)
        .ok_or("no funcName")?;
    let printable = name.bytes().all(|b| b.is_ascii_graphic());
    if name.is_empty() || name.len() > MAX_NAME || !printable {
        return Err(format!("funcName {name:?} is not a name"));
    }
    let id = item
        .get("funcId")
        .and_then(Value::as_u64)
        .and_then(|id| u32::try_from(id).ok())
        .filter(|id| *id > 0)
        .ok_or_else(|| format!("{name} has no funcId above 0"))?;
    Ok(FuncEntry {
        name: name.to_owned(),
        id,
        min_workers: item.get("minWorkers").and_then(Value::as_i64),
        max_workers: item.get("maxWorkers").and_then(Value::as_i64),
    })
}

#[cfg(fuzzing)]
pub(crate) fn read_bytes(bytes: &[u8]) {
    use std::os::unix::ffi::OsStringExt;

    let _ = parse(bytes);
    let argv: Vec<OsString> = bytes
        .split(|b| *b == 0)
        .map(|part| OsString::from_vec(part.to_vec()))
        .collect();
    let _ = (role(&argv), library(&argv));
    let _ = (
        flag(&argv, "func_config_file"),
        number_flag(&argv, "http_port"),
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(line: &str) -> Vec<OsString> {
        line.split(' ').map(OsString::from).collect()
    }

    #[test]
    fn flags_in_all_their_spellings() {
        for line in [
            "e --x=1",
            "e -x=1",
            "e --x 1",
            "e -x 1",
            "e --x=0 --y --x=1",
            "e -v=1 --x=1",
        ] {
            assert_eq!(number_flag(&argv(line), "x"), Some(1), "{line}");
        }
        for line in ["e", "--x=1", "e --xy=1", "e -- --x=1", "e --x", "e x=1"] {
            assert_eq!(number_flag(&argv(line), "x"), None, "{line}");
        }
    }

    #[test]
    fn roles_need_the_program_and_its_flag() {
        assert_eq!(
            role(&argv("/bin/engine --func_config_file=/c.json")),
            Some(Role::Engine)
        );
        assert_eq!(
            role(&argv("gateway -func_config_file /c.json")),
            Some(Role::Gateway)
        );
        assert_eq!(role(&argv("/n/launcher --func_id=1")), Some(Role::Launcher));
        assert_eq!(
            role(&argv("docker run engine --func_config_file=/c.json")),
            None
        );
        assert_eq!(role(&argv("engine --help")), None);
        assert_eq!(role(&[]), None);
    }

    #[test]
    fn the_library_is_the_worker_s_positional_argument() {
        let of = |line| library(&argv(line));
        let foo = Some(PathBuf::from("/f/libfoo.so"));
        assert_eq!(of("/nightcore/func_worker_v1 /f/libfoo.so"), foo);
        assert_eq!(of("func_worker_v1 --v=1 /f/libfoo.so"), foo);
        assert_eq!(of("func_worker_v1 /f/libfoo.so --v 1"), foo);
        assert_eq!(of("/lib64/ld.so /n/func_worker_v1 /f/libfoo.so"), foo);
        assert_eq!(of("func_worker_v1 /f/foo"), Some(PathBuf::from("/f/foo")));
        assert_eq!(of("func_worker_v1"), None);
        assert_eq!(of("node main.js"), None);
        let shell = ["sh", "-c", "/n/func_worker_v1 /f/libfoo.so"].map(OsString::from);
        assert_eq!(library(&shell), None);
    }

    #[test]
    fn nightcore_s_own_example_parses() {
        let text = br#"[{ "funcName": "Foo", "funcId": 1, "minWorkers": 2, "maxWorkers": 2 },
                        { "funcName": "grpc:a.B", "funcId": 2, "grpcMethods": ["x"] }]"#;
        let entries = parse(text).unwrap();
        assert_eq!(entries[0].name, "Foo");
        assert_eq!((entries[0].id, entries[0].max_workers), (1, Some(2)));
        assert_eq!((entries[1].id, entries[1].min_workers), (2, None));
    }

    #[test]
    fn a_bad_configuration_says_where() {
        let fails = |text: &str| parse(text.as_bytes()).unwrap_err();
        assert_eq!(fails("{}"), "it is not an array of functions");
        assert_eq!(fails("[{}]"), "entry 0: no funcName");
        assert_eq!(
            fails(r#"[{"funcName":"A"}]"#),
            "entry 0: A has no funcId above 0"
        );
        assert_eq!(
            fails(r#"[{"funcName":"A","funcId":0}]"#),
            "entry 0: A has no funcId above 0"
        );
        assert_eq!(
            fails(r#"[{"funcName":"\u001b[2J","funcId":1}]"#),
            r#"entry 0: funcName "\u{1b}[2J" is not a name"#
        );
        assert_eq!(
            fails(r#"[{"funcName":"A","funcId":1},{"funcName":"B","funcId":1}]"#),
            "entry 1: B [1] repeats the name or id of A [1]"
        );
        assert!(fails("[").contains("line 1"));
    }
}
