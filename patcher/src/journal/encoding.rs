//! An entry as bytes.
//!
//! ```text
//!  0   "NGJE"          what it is
//!  4   u32             FORMAT
//!  8   u32             bytes of the text
//!  12  u32             CRC-32 of all bytes before and behind this field
//!  16  JSON            the entry
//! ```
//!
//! An entry of another format is told as such, with its number, and not read
//! any further. Numbers are little-endian.

use super::Entry;

/// Format of entries that this version writes, and the only one that it reads.
pub const FORMAT: u32 = 1;

const MARK: [u8; 4] = *b"NGJE";
const HEAD: usize = 16;

/// Why bytes are no entry for us.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreadable {
    /// Written by an agent of another version.
    #[error(
        "an entry of format {found}, and this agent knows format {FORMAT}: use the agent that wrote it"
    )]
    OtherFormat {
        /// Its format.
        found: u32,
    },
    /// Not what was written.
    #[error("a damaged entry ({0})")]
    Damaged(String),
}

impl Entry {
    /// The entry as bytes.
    ///
    /// # Errors
    /// It does not serialise.
    pub fn encode(&self) -> Result<Vec<u8>, Unreadable> {
        let text = serde_json::to_vec(self).map_err(|e| Unreadable::Damaged(e.to_string()))?;
        let mut bytes = Vec::with_capacity(HEAD + text.len());
        bytes.extend(MARK);
        bytes.extend(FORMAT.to_le_bytes());
        bytes.extend((text.len() as u32).to_le_bytes());
        bytes.extend(checksum(&bytes, &text).to_le_bytes());
        bytes.extend(text);
        Ok(bytes)
    }

    /// Reads what [`Entry::encode`] gave.
    ///
    /// # Errors
    /// See [`Unreadable`].
    pub fn decode(bytes: &[u8]) -> Result<Entry, Unreadable> {
        let damaged = |what: &str| Unreadable::Damaged(what.to_owned());
        let Some((head, text)) = bytes.split_at_checked(HEAD) else {
            return Err(damaged("it is too short"));
        };
        let word =
            |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        if head[..4] != MARK {
            return Err(damaged("its mark is missing"));
        }
        // Before all else: another format may be laid out in another way.
        if word(4) != FORMAT {
            return Err(Unreadable::OtherFormat { found: word(4) });
        }
        if word(8) as usize != text.len() {
            return Err(damaged("its length is another"));
        }
        if word(12) != checksum(&head[..12], text) {
            return Err(damaged("its checksum is wrong"));
        }
        serde_json::from_slice(text).map_err(|e| Unreadable::Damaged(e.to_string()))
    }
}

#[cfg(fuzzing)]
impl Entry {
    /// The entry whose text this is, if it is one's.
    pub(crate) fn of_text(text: &[u8]) -> Option<Entry> {
        serde_json::from_slice(text).ok()
    }
}

fn checksum(head: &[u8], text: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(head);
    hasher.update(text);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::journal::{Planned, Stage};
    use crate::manifest::Region;
    use crate::plan::Access;

    fn entry() -> Entry {
        let region = |start, len| Region { start, len };
        Entry {
            pid: 7,
            start_time: 99,
            stage: Stage::Mapping {
                callee: "Bar".into(),
                mappings: vec![Planned {
                    reservation: region(0x10_0000, 0x9000),
                    parts: vec![(region(0x10_1000, 0x2000), Access::ReadExecute)],
                    control: Some(region(0x10_8000, 0x1000)),
                }],
            },
            record: None,
        }
    }

    #[test]
    fn an_entry_is_read_as_it_was_written() {
        let entry = entry();
        assert_eq!(Entry::decode(&entry.encode().unwrap()), Ok(entry));
    }

    #[test]
    fn no_changed_byte_goes_unnoticed() {
        let bytes = entry().encode().unwrap();
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x20;
            assert!(Entry::decode(&changed).is_err(), "byte {at}");
        }
        for len in 0..bytes.len() {
            assert!(Entry::decode(&bytes[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn another_format_is_told_and_not_guessed() {
        let mut bytes = entry().encode().unwrap();
        bytes[4] = 2;
        let error = Entry::decode(&bytes).unwrap_err();
        assert_eq!(error, Unreadable::OtherFormat { found: 2 });
        assert_eq!(
            error.to_string(),
            "an entry of format 2, and this agent knows format 1: use the agent that wrote it"
        );
    }
}
