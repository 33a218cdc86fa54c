//! Exception tables: where a throw re-enters a function.
//!
//! The layout is that of the Itanium C++ ABI's exception tables as gcc and
//! LLVM emit them into `.gcc_except_table`.

use super::CodeError;
use super::image::Image;

/// Most call-site records of one function.
const MAX_RECORDS: usize = 1 << 18;

/// A landing pad and the range of instructions that it serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Pad {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) at: u64,
}

const MALFORMED: CodeError = CodeError::Malformed {
    what: ".gcc_except_table",
};

/// Landing pads of the function at `function` by its table at `lsda`.
pub(super) fn landing_pads(image: &Image, function: u64, lsda: u64) -> Result<Vec<Pad>, CodeError> {
    let Some(bytes) = image.bytes_from(lsda) else {
        return Ok(Vec::new());
    };
    parse(bytes, lsda, function).ok_or(MALFORMED)
}

fn parse(bytes: &[u8], address: u64, function: u64) -> Option<Vec<Pad>> {
    let mut cursor = Cursor { bytes, at: 0 };
    let base = match cursor.u8()? {
        OMITTED => function,
        encoding => {
            let place = address.wrapping_add(cursor.at as u64);
            let value = cursor.value(encoding & 0x0f)?;
            match encoding & 0x70 {
                0x00 => value,
                0x10 => place.wrapping_add(value),
                _ => return None,
            }
        }
    };
    if cursor.u8()? != OMITTED {
        cursor.uleb()?;
    }
    let encoding = cursor.u8()?;
    if encoding & 0x70 != 0 {
        return None;
    }
    let length = usize::try_from(cursor.uleb()?).ok()?;
    let end = cursor.at.checked_add(length)?;
    if end > bytes.len() {
        return None;
    }
    let mut pads = Vec::new();
    while cursor.at < end {
        let start = function.wrapping_add(cursor.value(encoding)?);
        let size = cursor.value(encoding)?;
        let pad = cursor.value(encoding)?;
        cursor.uleb()?;
        if pad != 0 {
            if pads.len() == MAX_RECORDS {
                return None;
            }
            pads.push(Pad {
                start,
                end: start.wrapping_add(size),
                at: base.wrapping_add(pad),
            });
        }
    }
    Some(pads)
}

/// `DW_EH_PE_omit`.
const OMITTED: u8 = 0xff;

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Cursor<'_> {
    fn u8(&mut self) -> Option<u8> {
        let byte = *self.bytes.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    fn fixed<const N: usize>(&mut self) -> Option<[u8; N]> {
        let end = self.at.checked_add(N)?;
        let bytes = self.bytes.get(self.at..end)?.try_into().ok()?;
        self.at = end;
        Some(bytes)
    }

    fn uleb(&mut self) -> Option<u64> {
        let mut value = 0_u64;
        for shift in (0..70).step_by(7) {
            let byte = self.u8()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift).unwrap_or(0);
            if byte & 0x80 == 0 {
                return Some(value);
            }
        }
        None
    }

    /// A value in the format of the lower half of a `DW_EH_PE` encoding.
    fn value(&mut self, format: u8) -> Option<u64> {
        Some(match format {
            0x00 | 0x04 | 0x0c => u64::from_le_bytes(self.fixed()?),
            0x01 => self.uleb()?,
            0x02 => u16::from_le_bytes(self.fixed()?).into(),
            0x03 => u32::from_le_bytes(self.fixed()?).into(),
            0x0a => i64::from(i16::from_le_bytes(self.fixed()?)) as u64,
            0x0b => i64::from(i32::from_le_bytes(self.fixed()?)) as u64,
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// g++ 12, `try { f(); } catch (...) { g(); }`.
    const TABLE: [u8; 20] = [
        0xff, // LPStart: the function's start
        0x9b, // TType: indirect pcrel sdata4
        0x11, // TType base offset
        0x01, // call sites: uleb128
        0x0a, // their length
        0x05, 0x05, 0x10, 0x01, // 5..10 lands at 0x10, action 1
        0x15, 0x85, 0x01, 0x00, 0x00, // 0x15.., size 0x85, no pad
        0x2a, // garbage beyond what the length covers
        0, 0, 0, 0, 0,
    ];

    #[test]
    fn call_sites_with_a_pad_are_read() {
        let mut table = TABLE;
        table[4] = 9;
        let pads = parse(&table, 0x3000, 0x1000).expect("a well-formed table");
        assert_eq!(
            pads,
            [Pad {
                start: 0x1005,
                end: 0x100a,
                at: 0x1010
            }]
        );
    }

    #[test]
    fn a_length_beyond_the_segment_is_malformed() {
        let mut table = TABLE;
        table[4] = 0x7f;
        assert_eq!(parse(&table, 0x3000, 0x1000), None);
        assert_eq!(parse(&table[..6], 0x3000, 0x1000), None);
    }
}
