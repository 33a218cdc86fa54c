//! The extended state (x87, SSE, AVX, AVX-512, PKRU, AMX) as a signal frame
//! carries it.
//!
//! ptrace gives an XSAVE image in the standard format. A signal frame wants the
//! same, and in the bytes that the FXSAVE area leaves to software (464..512) a
//! note of how large it is and what it holds, with a first magic number there
//! and a second one behind the image. Where the note does not fit what the
//! kernel has for the thread, it silently restores x87 and SSE only: so the
//! note must not claim more than the thread has.
//!
//! A processor without XSAVE has FXSAVE's area alone, and its signal frames end
//! with that: no note, no magic number.
//!
//! Layouts: Intel SDM volume 1, chapter 13; `arch/x86/include/uapi/asm/sigcontext.h`
//! (`struct _fpx_sw_bytes`); `arch/x86/kernel/fpu/signal.c`
//! (`check_xstate_in_sigframe`).

/// Where ptrace puts XCR0 (among the bytes left to software).
const XCR0: usize = 464;
const SOFTWARE: usize = 464;
const SOFTWARE_END: usize = 512;
/// XSTATE_BV: which components are not in their initial state.
const XSTATE_BV: usize = 512;
const XCOMP_BV: usize = 520;
const HEADER_END: usize = 576;

const FP_XSTATE_MAGIC1: u32 = 0x4650_5853;
const FP_XSTATE_MAGIC2: u32 = 0x4650_5845;
/// The second magic's length.
const MAGIC2_LENGTH: usize = 4;

const PKRU: u32 = 9;
/// AMX tiles: the one component that the kernel makes room for only once the
/// thread has used it.
const TILE_DATA: u32 = 18;

/// More than any x86-64 CPU has (with AMX some 11,000 bytes).
pub(crate) const MOST: usize = 32 * 1024;

/// Turns FXSAVE's area, all that a processor without XSAVE has, into one for a
/// signal frame.
pub(crate) fn for_signal_frame_without_xsave(image: &[u8; SOFTWARE_END]) -> Vec<u8> {
    let mut frame = image.to_vec();
    frame[SOFTWARE..].fill(0);
    frame
}

/// Whether an image for a signal frame is more than FXSAVE's area.
pub(crate) fn is_of_xsave(frame: &[u8]) -> bool {
    frame.len() > SOFTWARE_END
}

/// Turns an image as ptrace gives it into one for a signal frame, the second
/// magic included. `component` tells offset and size of a component in bytes.
///
/// Fails with a description of what is not as it should be.
pub(crate) fn for_signal_frame(
    image: &[u8],
    component: impl Fn(u32) -> (usize, usize),
) -> Result<Vec<u8>, String> {
    if image.len() < HEADER_END {
        return Err(format!("an image of {} bytes", image.len()));
    }
    let word = |at: usize| {
        image[at..]
            .first_chunk()
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let (mut features, mut in_use) = (word(XCR0), word(XSTATE_BV));
    if features & 3 != 3 {
        return Err(format!("components {features:#x}"));
    }
    if word(XCOMP_BV) != 0 {
        return Err(format!("a compacted image, {:#x}", word(XCOMP_BV)));
    }
    if in_use & (1 << TILE_DATA) == 0 {
        features &= !(1 << TILE_DATA);
    }
    let mut size = HEADER_END;
    for index in (2..63).filter(|index| features & (1 << index) != 0) {
        let (offset, length) = component(index);
        let end = offset + length;
        if length == 0 || offset < HEADER_END || end > image.len() {
            return Err(format!("component {index} at {offset}+{length}"));
        }
        size = size.max(end);
        // The kernel keeps PKRU beside the image; without its bit a restore
        // would set it to zero.
        if index == PKRU && image[offset..end].iter().any(|&byte| byte != 0) {
            in_use |= 1 << PKRU;
        }
    }
    in_use &= features;

    let mut frame = image[..size].to_vec();
    frame[XSTATE_BV..XCOMP_BV].copy_from_slice(&in_use.to_le_bytes());
    let software = &mut frame[SOFTWARE..SOFTWARE_END];
    software.fill(0);
    let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX).to_le_bytes();
    software[..4].copy_from_slice(&FP_XSTATE_MAGIC1.to_le_bytes());
    software[4..8].copy_from_slice(&length(size + MAGIC2_LENGTH));
    software[8..16].copy_from_slice(&features.to_le_bytes());
    software[16..20].copy_from_slice(&length(size));
    frame.extend_from_slice(&FP_XSTATE_MAGIC2.to_le_bytes());
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// AVX at 576, PKRU at 2688, tiles at 2816.
    fn component(index: u32) -> (usize, usize) {
        match index {
            2 => (576, 256),
            9 => (2688, 8),
            18 => (2816, 8192),
            _ => (0, 0),
        }
    }

    fn image(features: u64, in_use: u64) -> Vec<u8> {
        let mut image = vec![0; 2816 + 8192];
        image[XCR0..XCR0 + 8].copy_from_slice(&features.to_le_bytes());
        image[XSTATE_BV..XCOMP_BV].copy_from_slice(&in_use.to_le_bytes());
        image
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    #[test]
    fn the_note_says_how_much_there_is() {
        let frame = for_signal_frame(&image(7, 7), component).unwrap();
        assert_eq!(frame.len(), 832 + 4);
        assert_eq!(u32_at(&frame, 464), FP_XSTATE_MAGIC1);
        assert_eq!(u32_at(&frame, 468), 836);
        assert_eq!(frame[472..480], 7u64.to_le_bytes());
        assert_eq!(u32_at(&frame, 480), 832);
        assert_eq!(u32_at(&frame, 832), FP_XSTATE_MAGIC2);
    }

    #[test]
    fn unused_tiles_are_not_claimed() {
        let with_tiles = 7 | 1 << 18;
        let frame = for_signal_frame(&image(with_tiles, 7), component).unwrap();
        assert_eq!(frame.len(), 836);
        assert_eq!(frame[472..480], 7u64.to_le_bytes());
        let frame = for_signal_frame(&image(with_tiles, with_tiles), component).unwrap();
        assert_eq!(frame.len(), 2816 + 8192 + 4);
    }

    #[test]
    fn a_protection_key_is_never_dropped() {
        let mut image = image(7 | 1 << 9, 3);
        image[2688] = 0x54;
        let frame = for_signal_frame(&image, component).unwrap();
        assert_eq!(frame[512..520], (3u64 | 1 << 9).to_le_bytes());
        assert_eq!(frame.len(), 2696 + 4);
    }

    #[test]
    fn without_xsave_there_is_no_note() {
        let frame = for_signal_frame_without_xsave(&[0xff; 512]);
        assert_eq!(frame[..464], [0xff; 464]);
        assert_eq!(frame[464..], [0; 48]);
        assert!(!is_of_xsave(&frame));
        assert!(is_of_xsave(
            &for_signal_frame(&image(3, 3), component).unwrap()
        ));
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        assert!(for_signal_frame(&[0; 512], component).is_err());
        assert!(for_signal_frame(&image(1, 1), component).is_err());
        let unknown = for_signal_frame(&image(7 | 1 << 20, 7), component).unwrap_err();
        assert_eq!(unknown, "component 20 at 0+0");
    }
}
