//! `/proc/PID/maps`.

use crate::Address;
use serde::{Deserialize, Serialize};

/// One line of `/proc/PID/maps`. What it says of files is a hint only: on
/// overlay file systems device and inode may not be what `stat` gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The first address.
    pub start: Address,
    /// The first address behind.
    pub end: Address,
    /// Readable for the process.
    pub readable: bool,
    /// Writable for the process.
    pub writable: bool,
    /// Executable for the process.
    pub executable: bool,
    /// Shared: writes go to the file or to others.
    pub shared: bool,
    /// Where in the file it begins, in bytes.
    pub offset: u64,
    /// Device number, major and minor.
    pub device: (u32, u32),
    /// Inode; 0 if no file is mapped.
    pub inode: u64,
    /// The file's path in the process's mount namespace (with " (deleted)"
    /// behind if it is), or a name such as `[stack]`; empty if anonymous.
    pub path: String,
}

impl Mapping {
    /// Whether the address lies in it.
    #[must_use]
    pub fn contains(&self, address: Address) -> bool {
        self.start <= address && address < self.end
    }

    /// Its length in bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.end.0 - self.start.0
    }

    /// Whether a file is mapped here, or the kernel's vdso.
    #[must_use]
    pub fn is_code_of_a_file(&self) -> bool {
        self.executable && (self.inode != 0 || self.path == "[vdso]")
    }
}

pub(crate) fn parse(text: &str) -> Result<Vec<Mapping>, ()> {
    text.lines()
        .map(|line| parse_line(line).ok_or(()))
        .collect()
}

fn parse_line(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut fields = line.splitn(6, ' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?.as_bytes();
    let offset = hex(fields.next()?)?;
    let (major, minor) = fields.next()?.split_once(':')?;
    let inode = fields.next()?.parse().ok()?;
    let path = fields.next().unwrap_or("").trim_start();
    let &[read, write, execute, share, ..] = permissions else {
        return None;
    };
    let (start, end) = (hex(start)?, hex(end)?);
    (start <= end).then_some(Mapping {
        start: Address(start),
        end: Address(end),
        readable: read == b'r',
        writable: write == b'w',
        executable: execute == b'x',
        shared: share == b's',
        offset,
        device: (
            u32::from_str_radix(major, 16).ok()?,
            u32::from_str_radix(minor, 16).ok()?,
        ),
        inode,
        path: path.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_understood() {
        let text = "\
7f25a4226000-7f25a437b000 r-xp 00026000 fe:01 1234                       /usr/lib/a b.so (deleted)
7ffc4a9f4000-7ffc4aa15000 rw-p 00000000 00:00 0                          [stack]
7f25a43ca000-7f25a43d7000 rw-s 00000000 00:00 0 
";
        let maps = parse(text).unwrap();
        assert_eq!(maps.len(), 3);
        assert_eq!(maps[0].start, Address(0x7f25_a422_6000));
        assert_eq!(maps[0].length(), 0x15_5000);
        assert!(maps[0].executable && !maps[0].writable && maps[0].is_code_of_a_file());
        assert_eq!(maps[0].device, (0xfe, 1));
        assert_eq!(maps[0].path, "/usr/lib/a b.so (deleted)");
        assert_eq!(maps[1].path, "[stack]");
        assert!(maps[2].shared && maps[2].path.is_empty());
        assert_eq!(parse("nonsense"), Err(()));
        assert_eq!(parse("2000-1000 r-xp 00000000 00:00 0"), Err(()));
    }
}
