//! Where an image's unwind tables are, as an unwinder is told of them.

use super::Image;

/// Most entries that are walked.
const MOST: usize = 1 << 22;

impl Image {
    /// Address in the image of `.eh_frame`, if it ends in the zero length that
    /// `__register_frame` looks for. At the end of a segment the rest of the
    /// page counts: it is zero.
    #[must_use]
    pub fn eh_frame(&self) -> Option<u64> {
        let header = self.eh_frame_header?;
        let bytes = self.at(header, 8)?;
        // Version 1; the address relative to where it stands, as four signed
        // bytes (DW_EH_PE_pcrel | DW_EH_PE_sdata4), as every linker writes it.
        if bytes[..2] != [1, 0x1b] {
            return None;
        }
        let offset = i32::from_le_bytes(bytes[4..8].try_into().ok()?);
        let start = (header + 4).wrapping_add_signed(i64::from(offset));
        self.is_terminated(start).then_some(start)
    }

    fn is_terminated(&self, start: u64) -> bool {
        let Some(segment) = self
            .segments
            .iter()
            .find(|s| (s.vaddr..s.vaddr + s.file_size).contains(&start))
        else {
            return false;
        };
        let end = segment.vaddr + segment.file_size;
        let mut at = start;
        for _ in 0..MOST {
            if at + 4 > end {
                let page_end = (segment.vaddr + segment.mem_size).next_multiple_of(0x1000);
                let zero = self
                    .at(at, end.saturating_sub(at))
                    .is_none_or(|rest| rest.iter().all(|b| *b == 0));
                return zero && at <= end && at + 4 <= page_end;
            }
            let Some(length) = self.at(at, 4) else {
                return false;
            };
            match u32::from_le_bytes([length[0], length[1], length[2], length[3]]) {
                0 => return true,
                u32::MAX => return false,
                length => at += 4 + u64::from(length),
            }
        }
        false
    }
}
