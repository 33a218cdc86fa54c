//! Constants of a library that may say what an effect touches: paths for
//! `files`, addresses for `network`, zones for `time-zone`.
//!
//! Looked for in what the image can only read: the parts of its file that are
//! mapped without write access, but for the dynamic string table (names of
//! symbols and libraries). A shape decides, so a constant may be something
//! else, or never be used.

use crate::elf::Image;

/// Most strings of a kind that are given.
const MOST: usize = 8;
/// Longest string that is looked at, in bytes; a path or address is shorter.
const LONGEST: usize = 128;

/// What was found.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Evidence {
    /// In the order of the file, each once.
    pub(super) strings: Vec<String>,
    /// How many more there are.
    pub(super) more: usize,
}

/// The constants of `image` that have the shape of what `kind` touches.
pub(super) fn evidence(image: &Image, kind: &str) -> Evidence {
    let mut found = Evidence::default();
    let fits: fn(&str) -> Option<String> = match kind {
        "files" => path,
        "network" => address,
        "time-zone" => zone,
        _ => return found,
    };
    let mut all: Vec<String> = Vec::new();
    for text in constants(image) {
        if let Some(text) = fits(text)
            && !all.contains(&text)
        {
            if all.len() < MOST {
                all.push(text);
            } else {
                found.more += 1;
            }
        }
    }
    found.strings = all;
    found
}

/// Printable strings that end in NUL, of 2 to [`LONGEST`] bytes.
fn constants(image: &Image) -> impl Iterator<Item = &str> {
    let names = image.dynamic.string_table.unwrap_or(0);
    let names_len = image.dynamic.string_table_size.unwrap_or(0);
    image
        .segments
        .iter()
        .filter(|s| !s.writable())
        .flat_map(move |s| {
            let end = s.vaddr.saturating_add(s.file_size);
            // What lies before the table of names and behind it.
            let cut = names.clamp(s.vaddr, end);
            let after = names.saturating_add(names_len).clamp(cut, end);
            [(s.vaddr, cut), (after, end)]
        })
        .filter_map(|(from, to)| image.at(from, to - from))
        .flat_map(|bytes| {
            // The last piece has no NUL behind it.
            let whole = bytes.iter().rposition(|b| *b == 0).map_or(0, |end| end + 1);
            bytes[..whole].split(|b| *b == 0)
        })
        .filter_map(|piece| {
            // A string may follow other bytes, such as code or numbers.
            let start = piece.iter().rposition(|b| !matches!(b, 0x20..=0x7e));
            let text = &piece[start.map_or(0, |at| at + 1)..];
            let fits = (2..=LONGEST).contains(&text.len());
            fits.then(|| std::str::from_utf8(text).ok()).flatten()
        })
}

/// First parts of absolute paths.
const FOLDERS: &str = "app bin boot data dev etc func function functions home lib lib64 media mnt opt proc \
                       root run sbin srv sys tmp usr var";
/// Last parts of names that are files whatever stands before.
const SUFFIXES: &str = "conf cfg cnf config ini json yaml yml toml xml properties env csv tsv db sqlite \
                        sqlite3 pem crt cer key p12 pfx jks log pid lock sock dat txt";

/// `/etc/bar.conf`, `bar.conf`, `conf/bar.json`.
fn path(text: &str) -> Option<String> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "._-+@%/".contains(c);
    if !text.chars().all(plain) || text.contains("//") {
        return None;
    }
    let last = text.rsplit('/').next().unwrap_or_default();
    let fits = match text.strip_prefix('/') {
        Some(rest) => {
            let first = rest.split('/').next().unwrap_or_default();
            // Names of source files stand in assertions and logs.
            let source = [
                ".c", ".cc", ".cpp", ".cxx", ".h", ".hh", ".hpp", ".rs", ".inl",
            ];
            FOLDERS.split_ascii_whitespace().any(|f| f == first)
                && !source.iter().any(|s| last.ends_with(s))
        }
        None => last.rsplit_once('.').is_some_and(|(stem, suffix)| {
            let named = stem.chars().any(|c| c.is_ascii_alphanumeric());
            named && SUFFIXES.split_ascii_whitespace().any(|s| s == suffix)
        }),
    };
    fits.then(|| text.to_owned())
}

/// `scheme://host…` or `host:port`, without a user's name and password.
fn address(text: &str) -> Option<String> {
    if text.contains(|c: char| c.is_ascii_whitespace() || "\"<>\\^`{|}".contains(c)) {
        return None;
    }
    if let Some((scheme, rest)) = text.split_once("://") {
        let named = scheme.starts_with(|c: char| c.is_ascii_lowercase())
            && scheme
                .chars()
                .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-.".contains(c));
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = match authority.rsplit_once('@') {
            Some((user, host)) => (Some(user), host),
            None => (None, authority),
        };
        if !named
            || scheme == "file"
            || !host.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '[')
        {
            return None;
        }
        return Some(match user {
            Some(user) => text.replacen(user, "...", 1),
            None => text.to_owned(),
        });
    }
    let (host, port) = text.rsplit_once(':')?;
    let port_fits =
        port.parse::<u16>().is_ok_and(|port| port > 0) && port.bytes().all(|b| b.is_ascii_digit());
    (port_fits && is_host(host)).then(|| text.to_owned())
}

/// A host's name or a dotted IPv4 address.
fn is_host(text: &str) -> bool {
    let labels: Vec<&str> = text.split('.').collect();
    let plain = |label: &&str| {
        !label.is_empty() && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    };
    let numbers = labels.len() == 4 && labels.iter().all(|label| label.parse::<u8>().is_ok());
    let name = text.starts_with(|c: char| c.is_ascii_alphabetic()) && text.len() > 1;
    labels.iter().all(plain) && (numbers || name)
}

/// `TZ`, `Europe/Berlin`, the folder of zones.
fn zone(text: &str) -> Option<String> {
    const AREAS: &str =
        "Africa America Antarctica Arctic Asia Atlantic Australia Europe Indian Pacific Etc";
    let place = |rest: &str| {
        rest.starts_with(|c: char| c.is_ascii_uppercase())
            && rest
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "_-+/".contains(c))
    };
    let in_area = text.split_once('/').is_some_and(|(area, rest)| {
        AREAS.split_ascii_whitespace().any(|a| a == area) && place(rest)
    });
    let fits = text == "TZ"
        || in_area
        || text.starts_with("/usr/share/zoneinfo")
        || text == "/etc/localtime";
    fits.then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_from_other_text() {
        for text in [
            "/etc/bar.conf",
            "/var/lib/bar",
            "/tmp",
            "bar.conf",
            "conf/bar.json",
            "./x.yaml",
            "../certs/ca.pem",
            "/dev/urandom",
            "/proc/self/maps",
        ] {
            assert_eq!(path(text).as_deref(), Some(text));
        }
        for text in [
            "/",
            "/build/src/bar.cc",
            "/usr/include/c++/12/bits/x.h",
            "a/b",
            ".conf",
            "//etc//x",
            "/nope/x",
            "see /etc/bar.conf",
            "%s.txt\n",
            "hello.",
            "1.5",
            "text/html",
            "a.b.c",
        ] {
            assert_eq!(path(text), None, "{text}");
        }
    }

    #[test]
    fn addresses_are_told_without_what_is_secret_in_them() {
        for text in [
            "http://bar.example/x?y=1",
            "redis://10.0.0.1:6379",
            "db.local:5432",
            "127.0.0.1:80",
            "localhost:9090",
            "tcp://[::1]:99",
        ] {
            assert_eq!(address(text).as_deref(), Some(text));
        }
        assert_eq!(
            address("postgres://me:pass@db/x").as_deref(),
            Some("postgres://...@db/x")
        );
        for text in [
            "http://",
            "file:///etc/x",
            "12:30",
            "a b:80",
            "x:80",
            "std::string",
            "key:value",
            "host:0",
            "host:70000",
            "host:+80",
            "1.2.3:80",
            "-a.b:80",
            "%s://%s",
            "://x",
        ] {
            assert_eq!(address(text), None, "{text}");
        }
    }

    #[test]
    fn zones_are_told() {
        for text in [
            "TZ",
            "Europe/Berlin",
            "America/Argentina/Salta",
            "Etc/GMT+3",
            "/usr/share/zoneinfo/UTC",
        ] {
            assert_eq!(zone(text).as_deref(), Some(text));
        }
        for text in [
            "UTC",
            "Europe",
            "europe/berlin",
            "Europe/berlin",
            "Asia/ and more",
        ] {
            assert_eq!(zone(text), None, "{text}");
        }
    }
}
