//! Forward data flow over one function: what is in the registers and in the
//! frame before each instruction.
//!
//! Blocks begin at labels. States meet at them ([`State::join`]) until
//! nothing changes; then every block is run once more and shown to a visitor.
//! Parts of a function that lie elsewhere (`.cold`) are followed; functions
//! that are called are not: a call leaves its clobbered registers
//! [`Value::Undefined`]. Stores through unknown pointers are taken to miss
//! the frame, since what is found is checked again when it runs.

mod step;
mod summary;
mod value;

use std::cell::RefCell;
use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::rc::Rc;

use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};

use summary::{ANYTHING, Summary};

pub(super) use step::{Machine, Place};
pub(super) use value::{ARGUMENTS, RSP, State, Value, gpr, number};

use super::extents::{Extent, index_of};
use super::image::{Image, Stored};
use super::labels::Labels;

/// Changes of one block's state after which it is given up upon.
const WIDEN_AFTER: u32 = 12;
/// Most targets of an absolute jump table.
const MAX_TARGETS: usize = 1 << 12;

/// A library's code, decoded on demand.
pub(super) struct Code<'a> {
    pub(super) image: &'a Image,
    pub(super) extents: &'a [Extent],
    pub(super) labels: &'a Labels,
    summaries: RefCell<HashMap<u64, Summary>>,
}

/// One run over one function.
struct Run<'c, 'a> {
    code: &'c Code<'a>,
    states: BTreeMap<u64, (State, u32)>,
    work: BTreeSet<u64>,
    decoded: HashMap<usize, Rc<[Instruction]>>,
    followed: HashSet<u64>,
    /// Where the states of indirect jumps through one table (or through an
    /// unknown one) of an extent meet.
    hubs: HashMap<(usize, Option<u64>), (State, u32)>,
    budget: usize,
}

impl<'a> Code<'a> {
    pub(super) fn new(image: &'a Image, extents: &'a [Extent], labels: &'a Labels) -> Code<'a> {
        Code {
            image,
            extents,
            labels,
            summaries: RefCell::default(),
        }
    }

    /// The instructions of an extent, in order.
    pub(super) fn decode(&self, extent: &Extent) -> Vec<Instruction> {
        decode(self.image, extent.start, extent.end)
    }

    /// Runs the function that begins at extent `root` and shows each of its
    /// instructions, with the state before it, to `visit`. Returns the starts
    /// of other extents that turned out to be parts of it; `None` if it is
    /// too tangled to be followed within bounds.
    pub(super) fn run(
        &self,
        root: usize,
        machine: &mut Machine<'a>,
        visit: &mut dyn FnMut(&mut Machine<'a>, &State, &Instruction),
    ) -> Option<HashSet<u64>> {
        let extent = self.extents.get(root)?;
        let mut run = Run {
            code: self,
            states: BTreeMap::new(),
            work: BTreeSet::new(),
            decoded: HashMap::new(),
            followed: HashSet::new(),
            hubs: HashMap::new(),
            budget: 0,
        };
        run.budget = 20_000 + 64 * run.instructions(root).len();
        run.states.insert(extent.start, (State::entry(), 0));
        run.work.insert(extent.start);
        while let Some(at) = run.work.pop_first() {
            run.block(at, machine, None)?;
        }
        let starts: Vec<u64> = run.states.keys().copied().collect();
        run.budget = usize::MAX;
        for at in starts {
            run.block(at, machine, Some(visit))?;
        }
        Some(run.followed)
    }

    /// Whether the function at this extent takes the address of a jump table.
    pub(super) fn has_table(&self, extent: usize) -> bool {
        let all = self.decode(&self.extents[extent]);
        let mut bases = all
            .iter()
            .filter(|i| i.mnemonic() == Mnemonic::Lea && i.is_ip_rel_memory_operand())
            .map(Instruction::ip_rel_memory_address);
        bases.any(|base| self.labels.table(base).is_some() || !self.absolute_table(base).is_empty())
    }

    /// Whether something within this extent is entered or addressed as a
    /// function: where a computed `goto` leads looks like that.
    pub(super) fn has_inner_function(&self, extent: usize) -> bool {
        let extent = &self.extents[extent];
        self.labels.has_function(extent.start + 1, extent.end)
    }

    /// Where the absolute jump table at `base` leads.
    fn absolute_table(&self, base: u64) -> Vec<u64> {
        let entries = self
            .image
            .stored_in(base, base.saturating_add(8 * MAX_TARGETS as u64));
        let mut targets = Vec::new();
        for (index, &(at, stored)) in entries.iter().enumerate() {
            match stored {
                Stored::Address(to) if at == base + 8 * index as u64 && self.image.is_code(to) => {
                    targets.push(to);
                }
                _ => break,
            }
        }
        targets
    }
}

/// Decodes `start..end`; bytes that are no instruction are left out.
pub(super) fn decode(image: &Image, start: u64, end: u64) -> Vec<Instruction> {
    let Some(bytes) = image.bytes(start, end) else {
        return Vec::new();
    };
    let mut all = Vec::with_capacity(bytes.len() / 4);
    let mut decoder = Decoder::with_ip(64, bytes, start, DecoderOptions::NONE);
    while decoder.can_decode() {
        let position = decoder.position();
        let instruction = decoder.decode();
        if instruction.is_invalid() {
            decoder.set_ip(start + position as u64 + 1);
            if decoder.set_position(position + 1).is_err() {
                break;
            }
        } else {
            all.push(instruction);
        }
    }
    all
}

/// Whether `rsp` is where it was at the function's entry.
pub(super) fn at_entry_depth(state: &State) -> bool {
    state.registers[RSP]
        == Value::Stack {
            region: 0,
            offset: 0,
        }
}

type Visitor<'v, 'a> = &'v mut dyn FnMut(&mut Machine<'a>, &State, &Instruction);

impl<'a> Run<'_, 'a> {
    fn instructions(&mut self, extent: usize) -> Rc<[Instruction]> {
        let code = self.code;
        let entry = self.decoded.entry(extent);
        let list = entry.or_insert_with(|| code.decode(&code.extents[extent]).into());
        Rc::clone(list)
    }

    fn merge(&mut self, to: u64, state: &State, machine: &mut Machine<'a>) {
        match self.states.get_mut(&to) {
            Some((known, changes)) => {
                if known.join(state, &mut machine.sets, *changes > WIDEN_AFTER) {
                    *changes += 1;
                    self.work.insert(to);
                }
            }
            None => {
                self.states.insert(to, (state.clone(), 0));
                self.work.insert(to);
            }
        }
    }

    /// Runs the block at `start`. With a visitor the states are final, and
    /// nothing is merged any more.
    fn block(
        &mut self,
        start: u64,
        machine: &mut Machine<'a>,
        mut visit: Option<Visitor<'_, 'a>>,
    ) -> Option<()> {
        let code = self.code;
        let Some(extent) = index_of(code.extents, start) else {
            return Some(());
        };
        let instructions = self.instructions(extent);
        let first = instructions.partition_point(|i| i.ip() < start);
        let Some((mut state, _)) = self.states.get(&start).cloned() else {
            return Some(());
        };
        let mut labels = code.labels.within(start + 1, code.extents[extent].end);
        let mut expected = start;
        for instruction in &instructions[first..] {
            let ip = instruction.ip();
            if ip != expected {
                break;
            }
            expected = instruction.next_ip();
            while labels.first().is_some_and(|&l| l < ip) {
                labels = &labels[1..];
            }
            if labels.first() == Some(&ip) {
                if visit.is_none() {
                    self.merge(ip, &state, machine);
                }
                break;
            }
            self.budget = self.budget.checked_sub(1)?;
            if let Some(visit) = visit.as_mut() {
                visit(machine, &state, instruction);
            }
            if !self.instruction(instruction, extent, &mut state, machine, visit.is_none()) {
                break;
            }
        }
        Some(())
    }

    /// Executes one instruction; whether the next one follows.
    fn instruction(
        &mut self,
        instruction: &Instruction,
        extent: usize,
        state: &mut State,
        machine: &mut Machine<'a>,
        merge: bool,
    ) -> bool {
        let code = self.code;
        match instruction.flow_control() {
            FlowControl::Next => machine.step(state, instruction),
            FlowControl::Call | FlowControl::IndirectCall => {
                let returns = self.after_call(instruction, state);
                if merge {
                    for pad in code.labels.pads_of(instruction.next_ip()) {
                        self.merge(pad, state, machine);
                    }
                }
                return returns;
            }
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch => {
                if merge {
                    self.jump(instruction.near_branch_target(), extent, state, machine);
                }
                return instruction.flow_control() == FlowControl::ConditionalBranch;
            }
            FlowControl::IndirectBranch => {
                if merge {
                    self.switch(instruction, extent, state, machine);
                }
                return false;
            }
            FlowControl::XbeginXabortXend => {}
            FlowControl::Interrupt if instruction.mnemonic() != Mnemonic::Int3 => {}
            FlowControl::Return | FlowControl::Interrupt | FlowControl::Exception => return false,
        }
        true
    }

    /// Applies a call to the state; whether it returns.
    fn after_call(&self, instruction: &Instruction, state: &mut State) -> bool {
        let summary = if instruction.op0_kind() == OpKind::NearBranch64 {
            self.code.summary(instruction.near_branch_target(), 0)
        } else {
            Summary {
                returns: !self.code.calls_noreturn(instruction),
                ..ANYTHING
            }
        };
        let mask = summary.clobbers;
        for number in 0..16 {
            if mask >> number & 1 == 1 {
                state.registers[number] = Value::Undefined;
            }
        }
        // What a function returns may be passed on.
        state.registers[0] = Value::ANY;
        state.registers[2] = Value::ANY;
        state.vectors = [[Value::ANY; 2]; 16];
        summary.returns
    }

    /// A jump to `to`: within the function, into a part of it, or out of it.
    fn jump(&mut self, to: u64, from: usize, state: &State, machine: &mut Machine<'a>) {
        let code = self.code;
        let Some(extent) = index_of(code.extents, to) else {
            return;
        };
        if extent != from {
            let leaves = at_entry_depth(state) && code.labels.is_function(to);
            if leaves || code.labels.thunks.contains_key(&to) {
                return;
            }
            self.followed.insert(code.extents[extent].start);
        }
        self.merge(to, state, machine);
    }

    /// An indirect jump: a switch, as far as it stays within the function.
    fn switch(
        &mut self,
        instruction: &Instruction,
        extent: usize,
        state: &State,
        machine: &mut Machine<'a>,
    ) {
        let value = if instruction.op0_kind() == OpKind::Memory {
            let place = machine.place(state, instruction);
            machine.load(state, place)
        } else {
            machine.operand(state, instruction, 0)
        };
        let table = match value {
            Value::Label(base) => Some(base),
            Value::Field(_) | Value::Global(_) | Value::Parameter(_) | Value::Import => return,
            // Which table it was is lost: every one of this function.
            _ => None,
        };
        // Interpreters have hundreds of jumps with hundreds of targets each:
        // states meet before they part.
        let hub = self.hubs.entry((extent, table));
        let state = match hub {
            Entry::Occupied(mut known) => {
                let (known, changes) = known.get_mut();
                if !known.join(state, &mut machine.sets, *changes > WIDEN_AFTER) {
                    return;
                }
                *changes += 1;
                known.clone()
            }
            Entry::Vacant(new) => {
                new.insert((state.clone(), 0));
                state.clone()
            }
        };
        for to in self.switch_targets(extent, table) {
            self.jump(to, extent, &state, machine);
        }
    }

    fn switch_targets(&mut self, extent: usize, table: Option<u64>) -> Vec<u64> {
        let code = self.code;
        let all = |base: u64| match code.labels.table(base) {
            Some(targets) => targets.to_vec(),
            None => code.absolute_table(base),
        };
        let range = code.extents[extent].start..code.extents[extent].end;
        let mut targets = match table {
            Some(base) => all(base),
            None => {
                let bases: BTreeSet<u64> = self
                    .instructions(extent)
                    .iter()
                    .filter(|i| i.mnemonic() == Mnemonic::Lea && i.is_ip_rel_memory_operand())
                    .map(Instruction::ip_rel_memory_address)
                    .collect();
                bases.into_iter().flat_map(all).collect()
            }
        };
        targets.retain(|to| range.contains(to) || !code.labels.is_function(*to));
        targets.sort_unstable();
        targets.dedup();
        targets
    }
}

/// The register of an indirect branch through a register.
pub(super) fn register_target(instruction: &Instruction) -> Option<Register> {
    (instruction.op0_kind() == OpKind::Register).then(|| instruction.op0_register())
}
