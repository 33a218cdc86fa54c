//! The shared objects of a machine.

use std::collections::HashSet;
use std::fs;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// Where distributions put libraries.
const FOLDERS: &[&str] = &["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib"];
/// Deepest folder that is looked into.
const DEEPEST: usize = 12;

/// Every shared object in the standard folders, each file once, in the order
/// of their real paths.
#[must_use]
pub fn standard() -> Vec<PathBuf> {
    unique(FOLDERS.iter().flat_map(|folder| walk(Path::new(folder))))
}

/// Every shared object in and below `folder`, as [`standard`].
#[must_use]
pub fn below(folder: &Path) -> Vec<PathBuf> {
    unique(walk(folder))
}

/// At most `limit` of them, evenly spread.
#[must_use]
pub fn sample(all: Vec<PathBuf>, limit: usize) -> Vec<PathBuf> {
    let count = all.len();
    if count <= limit {
        return all;
    }
    let chosen = |index: &usize| index * limit / count != (index + 1) * limit / count;
    let mut numbered = all.into_iter().enumerate().collect::<Vec<_>>();
    numbered.retain(|(index, _)| chosen(index));
    numbered.into_iter().map(|(_, path)| path).collect()
}

fn unique(paths: impl IntoIterator<Item = PathBuf>) -> Vec<PathBuf> {
    let mut seen = HashSet::new();
    let mut found: Vec<PathBuf> = paths
        .into_iter()
        .filter_map(|path| path.canonicalize().ok())
        .filter(|path| {
            let identity = path.metadata().map(|m| (m.dev(), m.ino()));
            identity.is_ok_and(|identity| seen.insert(identity))
        })
        .collect();
    found.sort();
    found
}

/// Links to folders are not followed, those to files are.
fn walk(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(root) = folder.canonicalize() else {
        return found;
    };
    let mut folders = vec![(root, 0)];
    while let Some((folder, depth)) = folders.pop() {
        let Ok(entries) = fs::read_dir(folder) else {
            continue;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if depth < DEEPEST {
                    folders.push((path, depth + 1));
                }
            } else if entry.file_name().to_string_lossy().contains(".so") && is_library(&path) {
                found.push(path);
            }
        }
    }
    found
}

/// A shared object for 64-bit x86-64 that has segments to load, as its header
/// says. Files of debug information have none of their contents.
fn is_library(path: &Path) -> bool {
    let mut header = [0; 20];
    let regular = path.metadata().is_ok_and(|m| m.is_file());
    let mut read = || fs::File::open(path)?.read_exact(&mut header);
    let debug = path.starts_with("/usr/lib/debug");
    regular && !debug && read().is_ok() && is_header(&header)
}

fn is_header(header: &[u8; 20]) -> bool {
    // Class 64, little-endian; ET_DYN; EM_X86_64.
    header.starts_with(b"\x7fELF\x02\x01") && header[16..] == [3, 0, 62, 0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_spread_over_all() {
        let all: Vec<PathBuf> = (0..100).map(|i| PathBuf::from(i.to_string())).collect();
        for limit in [1, 7, 33, 99, 100, 1000] {
            let some = sample(all.clone(), limit);
            assert_eq!(some.len(), limit.min(100));
            assert!(some.iter().all(|path| all.contains(path)));
        }
        assert!(sample(all.clone(), 0).is_empty());
        let two = sample(all, 2);
        assert_eq!(two, [PathBuf::from("49"), PathBuf::from("99")]);
    }

    #[test]
    fn only_shared_objects_of_this_machine_are_taken() {
        let mut header = [0; 20];
        header[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header[16..].copy_from_slice(&[3, 0, 62, 0]);
        assert!(is_header(&header));
        for (at, value) in [(0, 0), (4, 1), (16, 2), (18, 3)] {
            let mut other = header;
            other[at] = value;
            assert!(!is_header(&other), "{at}");
        }
    }

    #[test]
    fn a_file_is_taken_once() {
        let folder = tempfile::tempdir().unwrap();
        let mut bytes = vec![0; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[16..20].copy_from_slice(&[3, 0, 62, 0]);
        let inner = folder.path().join("inner");
        fs::create_dir(&inner).unwrap();
        fs::write(inner.join("liba.so.1"), &bytes).unwrap();
        fs::write(inner.join("libscript.so"), "INPUT(liba.so.1)").unwrap();
        std::os::unix::fs::symlink("liba.so.1", inner.join("liba.so")).unwrap();
        let real = inner.canonicalize().unwrap().join("liba.so.1");
        assert_eq!(below(folder.path()), [real]);
    }
}
