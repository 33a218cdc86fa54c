//! Every place where control can enter code other than by falling through.
//!
//! What is collected is an over-approximation: a label too many costs at
//! most a window, a label too few would let a jump land inside one.
//!
//! - targets of direct branches, by a linear sweep over all code;
//! - entries of jump tables: relative ones (32-bit differences, behind a
//!   `lea` of the table) and absolute ones (relocated addresses);
//! - landing pads of exception tables;
//! - code addresses that are taken, by `lea` or by a relocation;
//! - what is read there as a constant, every word of it;
//! - symbols, and starts of functions.

use std::collections::{BTreeSet, HashMap, HashSet};

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::CodeError;
use super::extents::{Extent, index_of, split_gaps};
use super::image::{Image, Stored};
use super::lsda::{Pad, landing_pads};

/// Most entries that one jump table is believed to have.
const MAX_TABLE: usize = 1 << 14;
/// Most jump table entries that are read in all.
const MAX_ENTRIES: usize = 1 << 24;

/// The labels of a library, and what the sweep saw besides.
#[derive(Default)]
pub(super) struct Labels {
    /// All labels, ascending.
    all: Vec<u64>,
    /// Those that are entered as functions: called, addressed or named.
    functions: Vec<u64>,
    /// Relative jump tables: the base, and where its entries lead.
    tables: HashMap<u64, Vec<u64>>,
    /// Landing pads by the range of calls that they serve, ascending.
    pads: Vec<Pad>,
    /// Direct calls and jumps to elsewhere, by target: (to, from).
    pub(super) references: Vec<(u64, u64)>,
    /// Jumps from one extent into another: (from, to), ascending.
    pub(super) crossings: Vec<(u64, u64)>,
    /// Indirect calls and jumps, ascending (imports excepted).
    pub(super) indirect: Vec<u64>,
    /// Out-of-line retpoline thunks: where, and the register they go to.
    pub(super) thunks: HashMap<u64, Register>,
    /// What `lea` takes the address of, outside of code: tables among it.
    bases: BTreeSet<u64>,
    /// What of the image's first page `lea` takes the address of.
    low: BTreeSet<u64>,
    /// Where instructions begin, a bit per byte of each executable range.
    starts: Vec<(u64, Vec<u64>)>,
}

/// End of the image's first page.
const FIRST_PAGE: u64 = 4096;

impl Labels {
    /// Whether some instruction takes this address, of something in the image's
    /// first page. Elsewhere a number is no address by its size.
    pub(super) fn is_addressed(&self, at: u64) -> bool {
        self.low.contains(&at)
    }
}

/// Collects the labels. The extents come back with the ranges between
/// functions split where a label says that a function begins.
pub(super) fn collect(
    image: &Image,
    extents: Vec<Extent>,
) -> Result<(Vec<Extent>, Labels), CodeError> {
    let mut labels = Labels::default();
    for &(start, end) in image.code() {
        let words = (end - start).div_ceil(64) as usize;
        labels.starts.push((start, vec![0; words]));
    }
    for extent in &extents {
        labels.sweep(image, extent);
    }
    for symbol in &image.symbols {
        labels.all.push(symbol.at);
        if !symbol.name.contains(".cold") {
            labels.functions.push(symbol.at);
        }
    }
    for &(_, stored) in image.all_stored() {
        if let Stored::Address(at) = stored {
            labels.all.push(at);
            labels.functions.push(at);
        }
    }
    labels.settle(image);
    let swept: HashSet<(u64, u64)> = extents.iter().map(|e| (e.start, e.end)).collect();
    let extents = split_gaps(extents, &labels.functions);
    // A part's first instruction may be another one now, and what is cut off at
    // its end reads differently: sweep them again.
    let parts = extents
        .iter()
        .filter(|e| !swept.contains(&(e.start, e.end)));
    for extent in parts {
        labels.sweep(image, extent);
    }
    labels.read_tables(image)?;
    for extent in &extents {
        if extent.function {
            labels.all.push(extent.start);
        }
        if let Some(lsda) = extent.lsda {
            labels.pads.extend(landing_pads(image, extent.start, lsda)?);
        }
    }
    let pads: Vec<u64> = labels.pads.iter().map(|p| p.at).collect();
    labels.all.extend(pads);
    labels.pads.sort_by_key(|p| p.start);
    labels.settle(image);
    labels.find_crossings(&extents);
    labels.find_thunks(image);
    Ok((extents, labels))
}

impl Labels {
    fn settle(&mut self, image: &Image) {
        for list in [&mut self.all, &mut self.functions] {
            list.sort_unstable();
            list.dedup();
            list.retain(|&at| image.is_code(at));
        }
        self.references.sort_unstable();
        self.references.dedup();
        self.indirect.sort_unstable();
        self.indirect.dedup();
    }

    fn sweep(&mut self, image: &Image, extent: &Extent) {
        let Some(bytes) = image.bytes(extent.start, extent.end) else {
            return;
        };
        let mut decoder = Decoder::with_ip(64, bytes, extent.start, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.can_decode() {
            let position = decoder.position();
            decoder.decode_out(&mut instruction);
            if instruction.is_invalid() {
                // Data among code, or a cut: look for code from the next byte.
                decoder.set_ip(extent.start + position as u64 + 1);
                if decoder.set_position(position + 1).is_err() {
                    return;
                }
                continue;
            }
            self.mark_start(instruction.ip());
            self.look_at(image, extent, &instruction);
        }
    }

    fn bit(&self, at: u64) -> Option<(usize, usize, u32)> {
        let range = self.starts.partition_point(|s| s.0 <= at).checked_sub(1)?;
        let offset = at - self.starts[range].0;
        Some((range, (offset / 64) as usize, (offset % 64) as u32))
    }

    fn mark_start(&mut self, at: u64) {
        if let Some((range, word, bit)) = self.bit(at)
            && let Some(word) = self.starts[range].1.get_mut(word)
        {
            *word |= 1 << bit;
        }
    }

    fn is_start(&self, at: u64) -> bool {
        self.bit(at).is_some_and(|(range, word, bit)| {
            let word = self.starts[range].1.get(word);
            word.is_some_and(|word| word >> bit & 1 == 1)
        })
    }

    fn look_at(&mut self, image: &Image, extent: &Extent, instruction: &Instruction) {
        if instruction.is_ip_rel_memory_operand() && instruction.mnemonic() != Mnemonic::Lea {
            // Constants among code may look like filler.
            let at = instruction.ip_rel_memory_address();
            let size = instruction.memory_size().size() as u64;
            let words = (0..size.max(1))
                .step_by(4)
                .map(|word| at.wrapping_add(word));
            self.all.extend(words.filter(|word| image.is_code(*word)));
        }
        match instruction.flow_control() {
            FlowControl::Next => {
                if instruction.mnemonic() == Mnemonic::Lea && instruction.is_ip_rel_memory_operand()
                {
                    let at = instruction.ip_rel_memory_address();
                    if at < FIRST_PAGE {
                        self.low.insert(at);
                    }
                    if image.is_code(at) {
                        self.all.push(at);
                        self.functions.push(at);
                    } else if at.is_multiple_of(4) {
                        // Compilers align jump tables; strings need not be.
                        self.bases.insert(at);
                    }
                }
            }
            FlowControl::UnconditionalBranch
            | FlowControl::ConditionalBranch
            | FlowControl::Call
            | FlowControl::XbeginXabortXend => {
                let near = matches!(
                    instruction.op0_kind(),
                    OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                );
                if !near {
                    return;
                }
                let to = instruction.near_branch_target();
                self.all.push(to);
                let call = instruction.flow_control() == FlowControl::Call;
                if call {
                    self.functions.push(to);
                }
                if call || !(extent.start..extent.end).contains(&to) {
                    self.references.push((to, instruction.ip()));
                }
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall => {
                let import = instruction.is_ip_rel_memory_operand()
                    && image.stored(instruction.ip_rel_memory_address()) == Some(Stored::Import);
                if !import {
                    self.indirect.push(instruction.ip());
                }
            }
            FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => {}
        }
    }

    fn read_tables(&mut self, image: &Image) -> Result<(), CodeError> {
        let mut read = 0_usize;
        let bases: Vec<u64> = std::mem::take(&mut self.bases).into_iter().collect();
        for (index, &base) in bases.iter().enumerate() {
            // A table ends where its entries stop leading to instructions,
            // and where something else begins.
            let end = bases.get(index + 1).copied().unwrap_or(u64::MAX);
            let mut targets = Vec::new();
            let mut at = base;
            while at < end && targets.len() < MAX_TABLE {
                let Some(entry) = image.u32_at(at) else { break };
                let to = base.wrapping_add_signed(i64::from(entry as i32));
                if !self.is_start(to) {
                    break;
                }
                targets.push(to);
                at += 4;
            }
            read += targets.len();
            if read > MAX_ENTRIES {
                return Err(CodeError::TooLarge {
                    what: "jump tables",
                    size: read as u64,
                    limit: MAX_ENTRIES as u64,
                });
            }
            if !targets.is_empty() {
                targets.sort_unstable();
                targets.dedup();
                self.all.extend_from_slice(&targets);
                self.tables.insert(base, targets);
            }
        }
        Ok(())
    }

    fn find_crossings(&mut self, extents: &[Extent]) {
        for &(to, from) in &self.references {
            let (a, b) = (index_of(extents, from), index_of(extents, to));
            if a != b && b.is_some() {
                self.crossings.push((from, to));
            }
        }
        self.crossings.sort_unstable();
    }

    fn find_thunks(&mut self, image: &Image) {
        let mut last = None;
        for &(to, _) in &self.references {
            if last.replace(to) != Some(to)
                && let Some(register) = thunk_register(image, to)
            {
                self.thunks.insert(to, register);
            }
        }
        for symbol in &image.symbols {
            if let Some(register) = thunk_name(&symbol.name) {
                self.thunks.insert(symbol.at, register);
            }
        }
        for &(to, from) in &self.references {
            if self.thunks.contains_key(&to) {
                self.indirect.push(from);
            }
        }
        self.indirect.sort_unstable();
    }

    /// Labels in `start..end`, ascending.
    pub(super) fn within(&self, start: u64, end: u64) -> &[u64] {
        let from = self.all.partition_point(|&at| at < start);
        let to = self.all.partition_point(|&at| at < end);
        self.all.get(from..to).unwrap_or_default()
    }

    /// Whether `at` is entered as a function.
    pub(super) fn is_function(&self, at: u64) -> bool {
        self.functions.binary_search(&at).is_ok()
    }

    /// Whether anything in `start..end` is entered as a function.
    pub(super) fn has_function(&self, start: u64, end: u64) -> bool {
        let next = self.functions.partition_point(|&at| at < start);
        self.functions.get(next).is_some_and(|&at| at < end)
    }

    /// Where the relative jump table at `base` leads.
    pub(super) fn table(&self, base: u64) -> Option<&[u64]> {
        self.tables.get(&base).map(Vec::as_slice)
    }

    /// Landing pads that serve a call which returns to `next`, its last byte
    /// being at `next - 1`.
    pub(super) fn pads_of(&self, next: u64) -> impl Iterator<Item = u64> {
        let at = next.wrapping_sub(1);
        let to = self.pads.partition_point(|p| p.start <= at);
        // Call-site ranges of one function do not overlap.
        let last = self.pads[..to].last();
        last.filter(|p| at < p.end).map(|p| p.at).into_iter()
    }

    /// Whether `start..end` holds an indirect call or jump.
    pub(super) fn has_indirect(&self, start: u64, end: u64) -> bool {
        let next = self.indirect.partition_point(|&at| at < start);
        self.indirect.get(next).is_some_and(|&at| at < end)
    }
}

fn thunk_name(name: &str) -> Option<Register> {
    let register = name
        .strip_prefix("__x86_indirect_thunk_")
        .or_else(|| name.strip_prefix("__llvm_retpoline_"))?;
    (0..16)
        .map(super::flow::gpr)
        .find(|r| format!("{r:?}").eq_ignore_ascii_case(register))
}

/// The register that the retpoline at `at` jumps to:
/// `call 1f; 0: pause; lfence; jmp 0b; 1: mov [rsp], reg; ret`.
fn thunk_register(image: &Image, at: u64) -> Option<Register> {
    let decode = |at: u64| {
        let bytes = image.bytes_from(at)?;
        let bytes = &bytes[..bytes.len().min(15)];
        let instruction = Decoder::with_ip(64, bytes, at, DecoderOptions::NONE).decode();
        (!instruction.is_invalid()).then_some(instruction)
    };
    let call = decode(at)?;
    if call.mnemonic() != Mnemonic::Call || call.op0_kind() != OpKind::NearBranch64 {
        return None;
    }
    let over = call.near_branch_target();
    if !(call.next_ip()..call.next_ip() + 64).contains(&over) {
        return None;
    }
    let mut trap = decode(call.next_ip())?;
    while matches!(trap.mnemonic(), Mnemonic::Pause | Mnemonic::Lfence) {
        trap = decode(trap.next_ip())?;
    }
    if trap.mnemonic() != Mnemonic::Jmp || trap.near_branch_target() != call.next_ip() {
        return None;
    }
    let store = decode(over)?;
    let replaces = store.mnemonic() == Mnemonic::Mov
        && store.op0_kind() == OpKind::Memory
        && store.memory_base() == Register::RSP
        && store.memory_index() == Register::None
        && store.memory_displacement64() == 0
        && store.op1_kind() == OpKind::Register
        && store.op1_register().is_gpr64();
    (replaces && decode(store.next_ip())?.mnemonic() == Mnemonic::Ret).then(|| store.op1_register())
}
