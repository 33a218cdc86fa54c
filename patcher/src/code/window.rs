//! The bytes that a rewrite replaces: whole instructions that nothing enters
//! but at their start.
//!
//! ```text
//!  before                          after
//!    lea rdi, [rbp-8]  ┐             nop            ┐
//!    mov r8, rsp       │ window      call stub      ┘ ends at the same address
//!    call [rbp+8]      ┘           back:
//!  back:
//! ```
//!
//! In a call window what is displaced runs below the return address that
//! `call stub` pushed, so operands relative to `rsp` move by 8 and everything
//! else that knows `rsp` is refused. `jmp stub` pushes nothing: in a jump
//! window (a tail jump) and in an entry window `rsp` is free to be used.
//!
//! Where a call window is not to be had, the call itself may become a jump,
//! whose stub pushes the return address. It costs a mispredicted return, and
//! comes second:
//!
//! ```text
//!  pushes before the call      a call that is a branch target itself
//!    push r12  ┐ jmp stub        call rax ─► jmp short filler
//!    call rax  ┘                 …
//!                                ret
//!                                nop…     ─► filler: jmp stub
//! ```

mod filler;
mod obstacle;

use iced_x86::{
    Decoder, DecoderOptions, FlowControl, Formatter, Instruction, InstructionInfoFactory,
    IntelFormatter, Mnemonic, OpKind, Register,
};
use serde::{Deserialize, Serialize};

pub(super) use obstacle::is_copy_of_rsp;
use obstacle::{obstacle, operand_obstacle};

use super::extents::index_of;
use super::flow::{Code, decode, number, register_target};
use super::{ImageAddress, SiteKind};

/// Length of `call rel32` and `jmp rel32`.
pub(super) const NEAR: u64 = 5;
/// A window is written at once, so it lies within one page.
const PAGE: u64 = 4096;

/// What a window is led away from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WindowKind {
    /// A call: `call stub`, ending where it ended.
    Call,
    /// A call, led away by a jump: the stub pushes the return address, which
    /// is the window's end.
    JumpedCall,
    /// A tail jump: `jmp stub`.
    Jump,
    /// The start of a function: `jmp stub`.
    Entry,
}

/// Where the original target comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// From a general register, by its number in the encoding (0 = rax).
    Register(u8),
    /// From the memory operand of the window's last instruction.
    Memory,
    /// It is the code that follows (entry windows).
    Next,
}

/// The bytes to replace, and all that is needed to do their work elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Window {
    /// Its first byte.
    pub start: ImageAddress,
    /// The bytes that are there, as the file has them.
    pub before: Vec<u8>,
    /// What it is led away from.
    pub kind: WindowKind,
    /// Where the original target comes from.
    pub target: Target,
    /// Offset of the call or jump in the window. In an entry window: the
    /// offset behind the displaced instructions. What lies before it is
    /// displaced into the stub.
    pub branch: u8,
    /// Bytes elsewhere that the window jumps to, having too few of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hop: Option<Hop>,
}

/// Filler that never runs, in reach of a jump of two bytes, with room for one
/// of five.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hop {
    /// Its first byte.
    pub at: ImageAddress,
    /// The bytes that are there, as the file has them.
    pub before: Vec<u8>,
}

impl WindowKind {
    /// Whether the window ends at a return address.
    #[must_use]
    pub fn is_call(self) -> bool {
        matches!(self, WindowKind::Call | WindowKind::JumpedCall)
    }
}

/// Why an instruction can't be displaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "kebab-case")]
pub enum Obstacle {
    /// It transfers control.
    #[error("transfers control")]
    Branch,
    /// It uses the stack pointer other than as the base of an operand at or
    /// above it.
    #[error("uses the stack pointer")]
    Stack,
    /// It must stay where indirect branches land.
    #[error("is a landing place for indirect branches")]
    Endbr,
    /// It is privileged, serialises state, or means something else elsewhere.
    #[error("is not code that may run elsewhere")]
    Exotic,
}

/// Why there is no window.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "code", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum NoWindow {
    /// No exported function has this name.
    #[error("no exported function is called {name}")]
    NoFunction {
        /// The name.
        name: String,
    },
    /// The bytes before the site do not decode into instructions that lead
    /// to it.
    #[error("the code around {at} can't be decoded")]
    Undecodable {
        /// The site.
        at: ImageAddress,
    },
    /// The function has too few bytes before (or, at its entry, behind) it.
    #[error("only {room} bytes of code around {at}, {NEAR} are needed")]
    Short {
        /// The site.
        at: ImageAddress,
        /// Bytes that there are.
        room: u64,
    },
    /// Something can jump or return into the window.
    #[error("control can enter at {label}, inside the window from {start}")]
    Entered {
        /// The window's start.
        start: ImageAddress,
        /// Where control can enter.
        label: ImageAddress,
    },
    /// An instruction can't be displaced.
    #[error("`{text}` at {at} {obstacle}")]
    Displaced {
        /// The instruction.
        at: ImageAddress,
        /// Its disassembly.
        text: String,
        /// Why not.
        obstacle: Obstacle,
    },
    /// The target's operand has no meaning in a stub.
    #[error("the target of `{text}` at {at} can't be loaded elsewhere")]
    Operand {
        /// The call or jump.
        at: ImageAddress,
        /// Its disassembly.
        text: String,
    },
    /// The window would lie in two pages.
    #[error("the window from {start} crosses the page boundary at {page}")]
    Page {
        /// The window's start.
        start: ImageAddress,
        /// The boundary.
        page: ImageAddress,
    },
    /// A relocation changes the window's bytes.
    #[error("a relocation at {at} changes the window's bytes")]
    Relocated {
        /// The relocation's place.
        at: ImageAddress,
    },
    /// The library enters its own function by a jump: such an entry can't be
    /// told from the worker's, as it brings no return address of its own.
    #[error("the library itself jumps to {at} from {from}")]
    Reentered {
        /// The function.
        at: ImageAddress,
        /// The jump.
        from: ImageAddress,
    },
    /// Another window of the library covers some of the bytes.
    #[error("the window from {start} overlaps the one from {other}")]
    Overlap {
        /// The window's start.
        start: ImageAddress,
        /// The other one's start.
        other: ImageAddress,
    },
}

impl NoWindow {
    /// The stable code of this reason, in kebab case.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            NoWindow::NoFunction { .. } => "no-function",
            NoWindow::Undecodable { .. } => "undecodable",
            NoWindow::Short { .. } => "short",
            NoWindow::Entered { .. } => "entered",
            NoWindow::Displaced { .. } => "displaced",
            NoWindow::Operand { .. } => "operand",
            NoWindow::Page { .. } => "page",
            NoWindow::Relocated { .. } => "relocated",
            NoWindow::Reentered { .. } => "reentered",
            NoWindow::Overlap { .. } => "overlap",
        }
    }
}

impl Window {
    /// First byte and end, in the image.
    pub(super) fn range(&self) -> (u64, u64) {
        let start = self.start.0;
        (start, start.saturating_add(self.before.len() as u64))
    }

    /// All ranges that it replaces, in the image.
    pub(crate) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        let hop = self.hop.as_ref().map(|h| (h.at.0, h.at.0 + NEAR));
        std::iter::once(self.range()).chain(hop)
    }

    /// How many instructions it has, up to the call or jump.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.instructions(0).len()
    }

    /// The window's instructions as they are in the image, the call or jump
    /// last (an entry window has none).
    pub(super) fn instructions(&self, bias: u64) -> Vec<Instruction> {
        let ip = bias.wrapping_add(self.start.0);
        let mut decoder = Decoder::with_ip(64, &self.before, ip, DecoderOptions::NONE);
        let mut all = Vec::new();
        while decoder.can_decode()
            && (decoder.position() < usize::from(self.branch)
                || self.kind != WindowKind::Entry && decoder.position() == usize::from(self.branch))
        {
            all.push(decoder.decode());
        }
        all
    }
}

/// Whether a window may jump to filler elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hops {
    /// It may.
    Allowed,
    /// Not yet: the filler may be another window's own.
    No,
}

/// The window of the site at `at`. `taken` are windows chosen before.
pub(super) fn of_site(
    code: &Code<'_>,
    at: u64,
    kind: SiteKind,
    hops: Hops,
    taken: &[(u64, u64)],
) -> Result<Window, NoWindow> {
    let undecodable = NoWindow::Undecodable {
        at: ImageAddress(at),
    };
    let extent = index_of(code.extents, at).ok_or(undecodable.clone())?;
    let extent = &code.extents[extent];
    let all = code.decode(extent);
    let index = all
        .binary_search_by_key(&at, Instruction::ip)
        .map_err(|_| undecodable.clone())?;
    let branch = &all[index];
    let kind_of_window = match kind {
        SiteKind::Call | SiteKind::ThunkCall => WindowKind::Call,
        SiteKind::TailJump | SiteKind::ThunkJump => WindowKind::Jump,
    };
    let target = target(code, branch, kind, kind_of_window)?;
    let end = branch.next_ip();
    let window = |kind, start: u64, end: u64, hop| Window {
        start: ImageAddress(start),
        before: code.image.bytes(start, end).unwrap_or_default().to_vec(),
        kind,
        target: target.clone(),
        branch: (at - start) as u8,
        hop,
    };
    let backwards = |kind: WindowKind| -> Result<Window, NoWindow> {
        let mut info = InstructionInfoFactory::new();
        let mut start = at;
        let mut before = all[..index].iter().rev();
        while end - start < NEAR {
            let Some(previous) = before.next() else {
                return Err(NoWindow::Short {
                    at: ImageAddress(at),
                    room: end - start,
                });
            };
            if previous.next_ip() != start {
                return Err(undecodable.clone());
            }
            if let Some(&label) = code.labels.within(start, start + 1).first() {
                return Err(NoWindow::Entered {
                    start: ImageAddress(previous.ip()),
                    label: ImageAddress(label),
                });
            }
            if let Some(obstacle) = obstacle(&mut info, previous, kind) {
                return Err(NoWindow::Displaced {
                    at: ImageAddress(previous.ip()),
                    text: text(previous),
                    obstacle,
                });
            }
            start = previous.ip();
        }
        check_range(code, start, end, taken)?;
        Ok(window(kind, start, end, None))
    };
    let first = match backwards(kind_of_window) {
        Ok(window) => return Ok(window),
        Err(reason) => reason,
    };
    let jumped = match kind_of_window {
        WindowKind::Call => {
            if let Ok(window) = backwards(WindowKind::JumpedCall) {
                return Ok(window);
            }
            WindowKind::JumpedCall
        }
        other => {
            // Nothing runs behind a jump: filler there makes room as well.
            let end = end + padding(code, end, (at + NEAR).saturating_sub(end));
            if end - at >= NEAR && check_range(code, at, end, taken).is_ok() {
                return Ok(window(other, at, end, None));
            }
            other
        }
    };
    if hops == Hops::Allowed
        && check_range(code, at, end, taken).is_ok()
        && let Some(hop) = filler::hop(code, at, taken)
    {
        return Ok(window(jumped, at, end, Some(hop)));
    }
    // What keeps the best kind of window away is what can be mended.
    Err(first)
}

/// The window at the entry of the exported function `name`.
pub(super) fn of_entry(code: &Code<'_>, name: &str) -> Result<Window, NoWindow> {
    let symbol = code
        .image
        .symbols
        .iter()
        .find(|s| s.exported && s.name == name);
    let missing = || NoWindow::NoFunction {
        name: name.to_owned(),
    };
    let function = symbol.ok_or_else(missing)?.at;
    let extent = index_of(code.extents, function).ok_or_else(missing)?;
    let all = decode(code.image, function, code.extents[extent].end);
    if let Some(from) = jump_to(code, function, &all) {
        return Err(NoWindow::Reentered {
            at: ImageAddress(function),
            from: ImageAddress(from),
        });
    }
    at_start(code, function, &all)
}

/// The window at the start of the function at `function`, whatever leads there.
pub(super) fn of_routine(code: &Code<'_>, function: u64) -> Result<Window, NoWindow> {
    let extent = index_of(code.extents, function).ok_or(NoWindow::Undecodable {
        at: ImageAddress(function),
    })?;
    let all = decode(code.image, function, code.extents[extent].end);
    at_start(code, function, &all)
}

/// `all` are the instructions of the function at `function`.
fn at_start(code: &Code<'_>, function: u64, all: &[Instruction]) -> Result<Window, NoWindow> {
    let mut rest = all.iter().peekable();
    let mut start = function;
    while let Some(i) = rest.next_if(|i| i.mnemonic() == Mnemonic::Endbr64) {
        start = i.next_ip();
    }
    let mut end = start;
    let mut info = InstructionInfoFactory::new();
    let mut falls = true;
    while end - start < NEAR && falls {
        let Some(i) = rest.next() else { break };
        if i.ip() != end {
            return Err(NoWindow::Undecodable {
                at: ImageAddress(end),
            });
        }
        if let Some(obstacle) = obstacle(&mut info, i, WindowKind::Entry) {
            return Err(NoWindow::Displaced {
                at: ImageAddress(i.ip()),
                text: text(i),
                obstacle,
            });
        }
        falls = matches!(
            i.flow_control(),
            FlowControl::Next | FlowControl::ConditionalBranch
        );
        end = i.next_ip();
    }
    let branch = end - start;
    if branch < NEAR && !falls {
        end += padding(code, end, start + NEAR - end);
    }
    if end - start < NEAR {
        return Err(NoWindow::Short {
            at: ImageAddress(start),
            room: end - start,
        });
    }
    check_range(code, start, end, &[])?;
    Ok(Window {
        start: ImageAddress(start),
        before: code.image.bytes(start, end).unwrap_or_default().to_vec(),
        kind: WindowKind::Entry,
        target: Target::Next,
        branch: branch as u8,
        hop: None,
    })
}

/// A jump (not a call) to the start of `function`, from within or from
/// elsewhere. `all` are the function's instructions.
fn jump_to(code: &Code<'_>, function: u64, all: &[Instruction]) -> Option<u64> {
    const CALL: u8 = 0xe8;
    // Behind the `endbr64` is as good as its start.
    let entry = function..=function + 4;
    let within = all.iter().find(|i| {
        matches!(
            i.flow_control(),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
        ) && entry.contains(&i.near_branch_target())
    });
    within.map(Instruction::ip).or_else(|| {
        let references = code.labels.references.iter();
        references
            .filter(|(to, from)| {
                entry.contains(to)
                    && code
                        .image
                        .bytes(*from, *from + 1)
                        .is_none_or(|b| b != [CALL])
            })
            .map(|(_, from)| *from)
            .next()
    })
}

/// `wanted` if that many bytes from `at`, where nothing falls through to, are
/// filler that nothing enters; else what there is.
fn padding(code: &Code<'_>, at: u64, wanted: u64) -> u64 {
    let Some(extent) = index_of(code.extents, at) else {
        return 0;
    };
    if !code.labels.within(at, at + wanted).is_empty() {
        return 0;
    }
    let mut end = at;
    for i in decode(code.image, at, code.extents[extent].end.min(at + 16)) {
        let filler = matches!(i.mnemonic(), Mnemonic::Nop | Mnemonic::Int3);
        if end - at >= wanted || i.ip() != end || !filler {
            break;
        }
        end = i.next_ip();
    }
    // Filler is taken apart freely: it never runs.
    (end - at).min(wanted)
}

fn check_range(
    code: &Code<'_>,
    start: u64,
    end: u64,
    taken: &[(u64, u64)],
) -> Result<(), NoWindow> {
    let page = (end - 1) & !(PAGE - 1);
    if start < page {
        return Err(NoWindow::Page {
            start: ImageAddress(start),
            page: ImageAddress(page),
        });
    }
    if let Some(&label) = code.labels.within(start + 1, end).first() {
        return Err(NoWindow::Entered {
            start: ImageAddress(start),
            label: ImageAddress(label),
        });
    }
    // The widest relocation covers eight bytes.
    if let Some(&(at, _)) = code.image.stored_in(start.saturating_sub(7), end).first() {
        return Err(NoWindow::Relocated {
            at: ImageAddress(at),
        });
    }
    if let Some(&(other, _)) = taken.iter().find(|&&(s, e)| s < end && start < e) {
        return Err(NoWindow::Overlap {
            start: ImageAddress(start),
            other: ImageAddress(other),
        });
    }
    Ok(())
}

fn target(
    code: &Code<'_>,
    branch: &Instruction,
    kind: SiteKind,
    window: WindowKind,
) -> Result<Target, NoWindow> {
    let operand = NoWindow::Operand {
        at: ImageAddress(branch.ip()),
        text: text(branch),
    };
    let register = match kind {
        SiteKind::ThunkCall | SiteKind::ThunkJump => code
            .labels
            .thunks
            .get(&branch.near_branch_target())
            .copied(),
        SiteKind::Call | SiteKind::TailJump => register_target(branch),
    };
    if let Some(register) = register {
        return match number(register) {
            Some(number) if register != Register::RSP => Ok(Target::Register(number as u8)),
            _ => Err(operand),
        };
    }
    let usable = branch.op0_kind() == OpKind::Memory
        && operand_obstacle(branch, window).is_none()
        && branch.memory_base() != Register::EIP;
    usable.then_some(Target::Memory).ok_or(operand)
}

pub(super) fn text(i: &Instruction) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(i, &mut text);
    text
}
