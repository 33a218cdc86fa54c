//! Whether a stopped thread is, or will be, in the middle of a window.
//!
//! Being there are three cases:
//! - the instruction pointer lies strictly inside: the thread can be moved to
//!   the copy of the same instruction in the stub (commit), or back to the
//!   window's start (revert: only no-operations lie before our branch);
//! - a signal handler interrupted it there: the saved instruction pointer in
//!   the signal frame, on this stack or on the one that it came from. That
//!   thread must run on until the handler is over;
//! - a return address: there is none, as no window holds a call but its last
//!   instruction.
//!
//! Pure: registers and a way to read the stack in, an answer out.

/// Offsets in an `rt_sigframe` from its first word, the address of the
/// restorer (arch/x86/include/asm/sigframe.h, uapi/asm/sigcontext.h).
const SAVED_RSP: u64 = 8 + 40 + 15 * 8;
const SAVED_RIP: u64 = 8 + 40 + 16 * 8;
/// `mov rax, 15; syscall`: what every C library's restorer is.
const RESTORER: [u8; 9] = [0x48, 0xc7, 0xc0, 0x0f, 0, 0, 0, 0x0f, 0x05];
/// Most bytes of one stack that are looked through in a stop: more than any
/// stack in practice has in use.
const MOST: u64 = 64 << 20;
/// Most stacks of one thread (each signal frame can lead to another).
const STACKS: usize = 8;

/// Reading the stopped process.
pub(super) trait Stack {
    /// Fills `into` from `address`; false if it is not mapped.
    fn read(&self, address: u64, into: &mut [u8]) -> bool;
    /// End of the mapping that holds `address`.
    fn mapping_end(&self, address: u64) -> Option<u64>;
}

/// A range whose middle is to be left alone: `(start, end)`.
pub(super) type Span = (u64, u64);

/// Whether `address` is strictly inside one of the spans.
pub(super) fn inside(address: u64, spans: &[Span]) -> Option<usize> {
    spans
        .iter()
        .position(|(start, end)| address > *start && address < *end)
}

/// What a thread's signal frames say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Interrupted {
    /// None returns into a span.
    Elsewhere,
    /// One returns strictly into a span.
    Inside,
    /// A stack could not be looked through: it was mapped or has grown since
    /// the mappings were read.
    Unknown,
}

/// Whether a signal frame on any of the thread's stacks will return strictly
/// into one of the spans.
pub(super) fn interrupted(rsp: u64, stack: &dyn Stack, spans: &[Span]) -> Interrupted {
    // A signal frame may lie anywhere above the red zone.
    let mut queue = vec![rsp];
    let mut seen: Vec<(u64, u64)> = Vec::new();
    while let Some(from) = queue.pop() {
        if seen.iter().any(|(low, high)| (*low..*high).contains(&from)) || seen.len() == STACKS {
            continue;
        }
        let from = from & !7;
        let Some(end) = stack.mapping_end(from) else {
            return Interrupted::Unknown;
        };
        let len = (end - from).min(MOST);
        let mut bytes = vec![0; len as usize];
        if !stack.read(from, &mut bytes) {
            return Interrupted::Unknown;
        }
        seen.push((from, from + len));
        let word = |offset: u64| {
            let at = usize::try_from(offset).ok()?;
            Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
        };
        for offset in (0..len.saturating_sub(SAVED_RIP)).step_by(8) {
            let (Some(pretcode), Some(rip)) = (word(offset), word(offset + SAVED_RIP)) else {
                break;
            };
            // Cheap tests first: a frame's restorer is code, far from zero.
            if !(0x1000..1 << 47).contains(&pretcode) {
                continue;
            }
            let hit = inside(rip, spans).is_some();
            let saved_rsp = word(offset + SAVED_RSP).unwrap_or(0);
            let elsewhere = saved_rsp & 7 == 0
                && !(from..from + len).contains(&saved_rsp)
                && stack.mapping_end(saved_rsp).is_some()
                && stack.mapping_end(rip).is_some();
            if (hit || elsewhere) && is_restorer(pretcode, stack) {
                if hit {
                    return Interrupted::Inside;
                }
                queue.push(saved_rsp);
            }
        }
    }
    Interrupted::Elsewhere
}

/// Only what is mapped is looked at: a read just below the main thread's stack
/// makes it grow.
fn is_restorer(address: u64, stack: &dyn Stack) -> bool {
    if stack.mapping_end(address).is_none() {
        return false;
    }
    let mut code = [0; RESTORER.len()];
    stack.read(address, &mut code) && code == RESTORER
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fake(Vec<(u64, Vec<u8>)>);

    impl Fake {
        fn put(&mut self, address: u64, value: u64) {
            let (start, bytes) = self
                .0
                .iter_mut()
                .find(|(s, b)| (*s..*s + b.len() as u64).contains(&address))
                .unwrap();
            let at = (address - *start) as usize;
            bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    impl Stack for Fake {
        fn read(&self, address: u64, into: &mut [u8]) -> bool {
            let Some((start, bytes)) = self
                .0
                .iter()
                .find(|(s, b)| (*s..*s + b.len() as u64).contains(&address))
            else {
                return false;
            };
            let at = (address - start) as usize;
            let Some(from) = bytes.get(at..at + into.len()) else {
                return false;
            };
            into.copy_from_slice(from);
            true
        }

        fn mapping_end(&self, address: u64) -> Option<u64> {
            let (start, bytes) = self
                .0
                .iter()
                .find(|(s, b)| (*s..*s + b.len() as u64).contains(&address))?;
            Some(start + bytes.len() as u64)
        }
    }

    const SPANS: [Span; 1] = [(0x40_0010, 0x40_0018)];

    fn memory() -> Fake {
        let mut restorer = RESTORER.to_vec();
        restorer.resize(64, 0xcc);
        Fake(vec![
            (0x7000_0000, vec![0; 0x4000]), // the thread's stack
            (0x6000_0000, vec![0; 0x4000]), // an alternate stack
            (0x40_0000, vec![0x90; 0x100]),
            (0x50_0000, restorer),
        ])
    }

    fn frame(m: &mut Fake, at: u64, rip: u64, rsp: u64) {
        m.put(at, 0x50_0000);
        m.put(at + SAVED_RIP, rip);
        m.put(at + SAVED_RSP, rsp);
    }

    #[test]
    fn only_the_middle_is_inside() {
        assert_eq!(inside(0x40_0010, &SPANS), None);
        assert_eq!(inside(0x40_0013, &SPANS), Some(0));
        assert_eq!(inside(0x40_0018, &SPANS), None);
    }

    #[test]
    fn a_signal_frame_that_returns_into_the_middle_is_found() {
        let mut m = memory();
        frame(&mut m, 0x7000_0800, 0x40_0013, 0x7000_2000);
        assert_eq!(interrupted(0x7000_0100, &m, &SPANS), Interrupted::Inside);
        frame(&mut m, 0x7000_0800, 0x40_0010, 0x7000_2000);
        assert_eq!(
            interrupted(0x7000_0100, &m, &SPANS),
            Interrupted::Elsewhere,
            "its start is no harm"
        );
        assert_eq!(
            interrupted(0x1000, &m, &SPANS),
            Interrupted::Unknown,
            "no known stack"
        );
    }

    #[test]
    fn a_handler_on_an_alternate_stack_leads_to_the_stack_below_it() {
        let mut m = memory();
        frame(&mut m, 0x6000_0800, 0x40_0040, 0x7000_1000);
        frame(&mut m, 0x7000_1100, 0x40_0013, 0x7000_2000);
        assert_eq!(interrupted(0x6000_0400, &m, &SPANS), Interrupted::Inside);
    }

    #[test]
    fn a_stale_word_is_no_frame() {
        let mut m = memory();
        m.put(0x7000_0900, 0x40_0013);
        m.put(0x7000_0900 - SAVED_RIP, 0x40_0040); // code, but no restorer
        assert_eq!(interrupted(0x7000_0100, &m, &SPANS), Interrupted::Elsewhere);
    }
}
