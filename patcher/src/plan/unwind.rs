//! Unwind tables of the stubs, as `__register_frame` takes them.
//!
//! A signal may arrive in a stub, and who unwinds from there (a cancelled
//! thread, a profiler) must find the caller's frame.

/// Where the stack pointer is in a stub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct StubFrame {
    /// Live address.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
    /// Offset behind the push of the target: the return address is one word
    /// further up from there on.
    pub(super) pushed: u16,
}

/// `.eh_frame`: one CIE, an FDE each, and the zero that ends it.
pub(super) fn eh_frame(stubs: &[StubFrame]) -> Vec<u8> {
    let mut bytes = Vec::new();
    entry(&mut bytes, |out| {
        out.extend(0_u32.to_le_bytes()); // a CIE
        out.push(1); // version
        out.extend(b"zR\0");
        out.push(1); // code alignment factor
        out.push(0x78); // data alignment factor: -8
        out.push(16); // return address
        out.extend([1, 0x00]); // addresses are absolute
        out.extend([0x0c, 7, 8]); // DW_CFA_def_cfa rsp, 8
        out.extend([0x80 | 16, 1]); // DW_CFA_offset: it lies at cfa - 8
    });
    for stub in stubs {
        let at = bytes.len() as u32;
        entry(&mut bytes, |out| {
            out.extend((at + 4).to_le_bytes()); // back to the CIE
            out.extend(stub.start.to_le_bytes());
            out.extend(stub.len.to_le_bytes());
            out.push(0); // no augmentation data
            out.push(0x03); // DW_CFA_advance_loc2
            out.extend(stub.pushed.to_le_bytes());
            out.extend([0x0e, 16]); // DW_CFA_def_cfa_offset
        });
    }
    bytes.extend(0_u32.to_le_bytes());
    bytes
}

/// Bytes of the tables of so many stubs.
pub(super) fn size(stubs: usize) -> usize {
    let any = StubFrame {
        start: 0,
        len: 0,
        pushed: 0,
    };
    eh_frame(&vec![any; stubs]).len()
}

fn entry(bytes: &mut Vec<u8>, body: impl FnOnce(&mut Vec<u8>)) {
    let at = bytes.len();
    bytes.extend([0; 4]);
    body(bytes);
    // DW_CFA_nop up to the next entry.
    bytes.resize(bytes.len().next_multiple_of(8) + 4, 0);
    let len = (bytes.len() - at - 4) as u32;
    bytes[at..at + 4].copy_from_slice(&len.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use gimli::{BaseAddresses, CfaRule, EhFrame, LittleEndian, UnwindContext, UnwindSection};

    use super::*;

    #[test]
    fn an_unwinder_finds_the_frame_before_and_behind_the_push() {
        let stubs = [
            StubFrame {
                start: 0x7000_0000_1000,
                len: 80,
                pushed: 12,
            },
            StubFrame {
                start: 0x7000_0000_1050,
                len: 300,
                pushed: 270,
            },
        ];
        let bytes = eh_frame(&stubs);
        let section = EhFrame::new(&bytes, LittleEndian);
        let bases = BaseAddresses::default();
        let offset_at = |address| {
            let mut context = UnwindContext::new();
            let row = section
                .unwind_info_for_address(&bases, &mut context, address, EhFrame::cie_from_offset)
                .unwrap();
            match row.cfa() {
                CfaRule::RegisterAndOffset { register, offset } => {
                    assert_eq!(*register, gimli::X86_64::RSP);
                    *offset
                }
                other => panic!("{other:?}"),
            }
        };
        for stub in stubs {
            let behind = stub.start + u64::from(stub.pushed);
            assert_eq!(offset_at(stub.start), 8);
            assert_eq!(offset_at(behind - 1), 8);
            assert_eq!(offset_at(behind), 16);
            assert_eq!(offset_at(stub.start + stub.len - 1), 16);
        }
        assert!(bytes.ends_with(&[0; 4]));
    }
}
