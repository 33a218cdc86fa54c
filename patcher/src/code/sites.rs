//! Which indirect calls and jumps are RPCs with a constant name.
//!
//! An RPC has six arguments, the second of which is the name; what else a
//! function library calls through pointers has fewer. A register that holds
//! what a call left behind is no argument, so `append_output` (three
//! arguments) is told apart by its fourth to sixth; if those were in use for
//! something else, by its third, a length where the RPC has a pointer, and by
//! its slot in the struct that `faas_create_func_worker` fills.
//!
//! A name that a function of the library gets as a parameter is looked up at
//! that function's direct callers.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};

use iced_x86::{Code as Opcode, FlowControl, Instruction, OpKind, Register};

use super::extents::index_of;
use super::flow::{
    ARGUMENTS, Code, Machine, Place, RSP, State, Value, at_entry_depth, number, register_target,
};
use super::{ImageAddress, Name, SiteKind};

/// Calls between the function that names and the one that invokes.
const MAX_DEPTH: u32 = 4;
/// Functions are not at addresses below this, nor are buffers.
const SMALL: u64 = 4096;
/// Functions whose parameters are fixed by nightcore's ABI, three at most
/// being pointers or lengths that an RPC would pass on.
const EXPORTS: [&str; 4] = [
    "faas_init",
    "faas_create_func_worker",
    "faas_destroy_func_worker",
    "faas_func_call",
];

/// A site before its window is known.
#[derive(Debug, Clone)]
pub(super) struct Found {
    pub(super) at: u64,
    pub(super) function: u64,
    pub(super) kind: SiteKind,
    pub(super) names: Vec<Name>,
    pub(super) exhaustive: bool,
}

/// Where `faas_create_func_worker` leaves a function pointer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Slot {
    Field(i64),
    Global(u64),
}

#[derive(Debug, Default)]
struct Slots {
    invoke: Option<Slot>,
    append: Option<Slot>,
}

/// What an argument is, as far as it tells an RPC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Argument {
    /// Nobody set it.
    Garbage,
    /// A number too small for a pointer (zero excepted).
    Small,
    /// An address in the caller's own frame, so a result is expected there.
    Frame(i64),
    /// The function's own parameter of this number, passed on.
    Parameter(u8),
    Other,
}

/// An indirect branch that may be an RPC, depending on the function's callers.
#[derive(Debug, Clone)]
struct Candidate {
    at: u64,
    function: u64,
    kind: SiteKind,
    arguments: [Argument; 6],
    slot: Option<Slot>,
    names: BTreeSet<u64>,
    open: bool,
}

/// What one run over one function yields.
#[derive(Default)]
struct Yield {
    candidates: Vec<Candidate>,
    /// Direct calls: target and what is passed.
    calls: Vec<(u64, [Argument; 6], Names)>,
}

/// The names that each argument may be, and whether it may be anything else.
type Names = [(Vec<u64>, bool); 6];

/// Finds the sites, by address, and whether there is an RPC whose name may be
/// something else than the names found.
pub(super) fn find(code: &Code<'_>) -> (Vec<Found>, bool) {
    let mut search = Search {
        code,
        slots: slots(code),
        sites: BTreeMap::new(),
        callers: HashMap::new(),
    };
    let mut wrappers = Vec::new();
    let mut unknown = false;
    for candidate in search.candidates() {
        if !candidate.names.is_empty() {
            search.judge(&candidate);
        } else if matches!(candidate.arguments[1], Argument::Parameter(_)) {
            wrappers.push(candidate);
        } else {
            unknown |= search.is_rpc(&candidate);
        }
    }
    for candidate in wrappers {
        let mut seen = HashSet::new();
        search.ask_callers(&candidate, candidate.function, MAX_DEPTH, &mut seen);
        unknown |= !search.sites.contains_key(&candidate.at) && search.is_rpc(&candidate);
    }
    (search.sites.into_values().collect(), unknown)
}

struct Search<'c, 'a> {
    code: &'c Code<'a>,
    slots: Slots,
    sites: BTreeMap<u64, Found>,
    callers: HashMap<u64, std::rc::Rc<Yield>>,
}

impl<'a> Search<'_, 'a> {
    /// Indirect branches whose arguments could be an RPC's.
    fn candidates(&self) -> Vec<Candidate> {
        let code = self.code;
        let extents = code.extents;
        let indirect = |index: usize| {
            code.labels
                .has_indirect(extents[index].start, extents[index].end)
        };
        // Parts of functions lie elsewhere: the function is what is run.
        let mut roots: BTreeSet<usize> = (0..extents.len())
            .filter(|&i| extents[i].function && indirect(i))
            .collect();
        for &(from, to) in &code.labels.crossings {
            if let (Some(a), Some(b)) = (index_of(extents, from), index_of(extents, to))
                && !code.labels.is_function(to)
                && extents[a].function
                && indirect(b)
            {
                roots.insert(a);
            }
        }
        let (named, parts): (Vec<usize>, Vec<usize>) = roots
            .into_iter()
            .partition(|&root| code.labels.is_function(extents[root].start));
        let mut followed = HashSet::new();
        let mut all = Vec::new();
        for root in named.into_iter().chain(parts) {
            let start = extents[root].start;
            if followed.contains(&start) && !code.labels.is_function(start) {
                continue;
            }
            let (found, parts) = run(code, root);
            all.extend(found.candidates);
            followed.extend(parts);
        }
        all
    }

    /// Takes a candidate whose names are known, or leaves it.
    fn judge(&mut self, candidate: &Candidate) {
        if !self.is_rpc(candidate) {
            return;
        }
        let image = self.code.image;
        let site = self.sites.entry(candidate.at).or_insert_with(|| Found {
            at: candidate.at,
            function: candidate.function,
            kind: candidate.kind,
            names: Vec::new(),
            exhaustive: true,
        });
        site.exhaustive &= !candidate.open;
        for &at in &candidate.names {
            if let Some(text) = image.name_at(at)
                && site.names.iter().all(|n| n.at.0 != at)
            {
                site.names.push(Name {
                    at: ImageAddress(at),
                    text: text.to_owned(),
                });
            }
        }
    }

    fn is_rpc(&self, candidate: &Candidate) -> bool {
        let [context, _, input, length, output, output_length] = candidate.arguments;
        let garbage = [context, input, length, output, output_length].contains(&Argument::Garbage);
        let pointers = [context, input, output, output_length];
        if garbage || pointers.contains(&Argument::Small) {
            return false;
        }
        let (invoke, append) = (self.slots.invoke, self.slots.append);
        let known = candidate.slot.is_some() && invoke != append;
        if known && candidate.slot == invoke {
            return true;
        }
        if known && candidate.slot == append {
            // Another struct may have the RPC there: then results are
            // expected in two places of the frame.
            return matches!(
                (output, output_length),
                (Argument::Frame(a), Argument::Frame(b)) if a != b
            );
        }
        // Parameters that were never touched are passed on, or garbage.
        let untouched = output == Argument::Parameter(4) || output_length == Argument::Parameter(5);
        !(untouched && self.is_export(candidate.function))
    }

    fn is_export(&self, function: u64) -> bool {
        self.code
            .image
            .symbols
            .iter()
            .any(|s| s.exported && s.at == function && EXPORTS.contains(&s.name.as_str()))
    }

    /// Looks for the names where `function` is called directly.
    fn ask_callers(
        &mut self,
        candidate: &Candidate,
        function: u64,
        depth: u32,
        seen: &mut HashSet<u64>,
    ) {
        if depth == 0 || !seen.insert(function) {
            return;
        }
        let references = &self.code.labels.references;
        let from = references.partition_point(|r| r.0 < function);
        let to = references.partition_point(|r| r.0 <= function);
        let roots: BTreeSet<usize> = references[from..to]
            .iter()
            .filter_map(|r| index_of(self.code.extents, r.1))
            .collect();
        for root in roots {
            let start = self.code.extents[root].start;
            let code = self.code;
            let yielded = std::rc::Rc::clone(
                self.callers
                    .entry(start)
                    .or_insert_with(|| std::rc::Rc::new(run(code, root).0)),
            );
            for (target, arguments, names) in &yielded.calls {
                if *target != function {
                    continue;
                }
                let Argument::Parameter(name) = candidate.arguments[1] else {
                    continue;
                };
                let mut deeper = candidate.clone();
                for argument in &mut deeper.arguments {
                    if let Argument::Parameter(number) = *argument {
                        *argument = arguments[usize::from(number)];
                    }
                }
                let (constants, open) = &names[usize::from(name)];
                deeper.names.extend(constants);
                deeper.open = *open;
                if !constants.is_empty() {
                    self.judge(&deeper);
                } else if matches!(deeper.arguments[1], Argument::Parameter(_)) {
                    self.ask_callers(&deeper, start, depth - 1, seen);
                }
            }
        }
    }
}

/// Runs one function and notes its calls.
fn run(code: &Code<'_>, root: usize) -> (Yield, HashSet<u64>) {
    let mut machine = Machine::new(code.image, code.labels);
    let mut found = Yield::default();
    let function = code.extents[root].start;
    let parts = code.run(
        root,
        &mut machine,
        &mut |machine, state, instruction| match instruction.flow_control() {
            FlowControl::Call | FlowControl::UnconditionalBranch
                if instruction.op0_kind() == OpKind::NearBranch64
                    && !code
                        .labels
                        .thunks
                        .contains_key(&instruction.near_branch_target()) =>
            {
                let to = instruction.near_branch_target();
                if code.labels.is_function(to) {
                    let (arguments, names) = arguments(machine, state);
                    found.calls.push((to, arguments, names));
                }
            }
            _ => {
                if let Some(candidate) = candidate(code, machine, state, instruction, function) {
                    found.candidates.push(candidate);
                }
            }
        },
    );
    (found, parts.unwrap_or_default())
}

fn arguments(machine: &Machine<'_>, state: &State) -> ([Argument; 6], Names) {
    let values = ARGUMENTS.map(|register| state.registers[register]);
    let kinds = values.map(|value| argument(machine, value));
    let names = values.map(|value| {
        let (constants, closed) = machine.sets.constants(value);
        let named = |at: &&u64| machine.image.name_at(**at).is_some();
        (constants.iter().filter(named).copied().collect(), !closed)
    });
    (kinds, names)
}

fn argument(machine: &Machine<'_>, value: Value) -> Argument {
    match value {
        Value::Undefined => Argument::Garbage,
        Value::Parameter(number) => Argument::Parameter(number),
        Value::Stack { offset, .. } => Argument::Frame(offset),
        value => {
            let (constants, closed) = machine.sets.constants(value);
            // An image's first page may hold constants, too.
            let small = |&c: &u64| c != 0 && c < SMALL && !machine.labels.is_addressed(c);
            if closed && !constants.is_empty() && constants.iter().all(small) {
                Argument::Small
            } else {
                Argument::Other
            }
        }
    }
}

/// The indirect branch at `instruction` as a candidate.
fn candidate(
    code: &Code<'_>,
    machine: &mut Machine<'_>,
    state: &State,
    instruction: &Instruction,
    function: u64,
) -> Option<Candidate> {
    let (kind, register) = branch(code, instruction)?;
    let jump = matches!(kind, SiteKind::TailJump | SiteKind::ThunkJump);
    if jump {
        // `notrack` marks a switch; in mid-frame it can't be a tail call.
        let elsewhere = matches!(
            state.registers[RSP],
            Value::Stack { region: 0, offset } if offset != 0
        );
        if elsewhere || instruction.segment_prefix() == Register::DS && register.is_some() {
            return None;
        }
    }
    let (value, place) = match register {
        Some(register) => {
            let number = number(register)?;
            // A register that holds an argument can't hold the target too.
            if ARGUMENTS.contains(&number) || number == RSP {
                return None;
            }
            (state.registers[number], None)
        }
        None => {
            let place = machine.place(state, instruction);
            (machine.load(state, place), Some(place))
        }
    };
    let slot = match (value, place) {
        (_, Some(Place::Image { indexed: true, .. })) => return None,
        (Value::Import | Value::Label(_) | Value::Entry(_), _) => return None,
        (Value::Field(offset), _) => Some(Slot::Field(offset)),
        (Value::Global(at), _) => Some(Slot::Global(at)),
        _ => None,
    };
    // A known function of this library is not the worker's.
    let (targets, closed) = machine.sets.constants(value);
    if closed && !targets.is_empty() {
        return None;
    }
    let (arguments, names) = arguments(machine, state);
    let [_, (names, open), ..] = names;
    // A name comes from somewhere, and is no number.
    if names.is_empty() && matches!(arguments[1], Argument::Garbage | Argument::Small) {
        return None;
    }
    Some(Candidate {
        at: instruction.ip(),
        function,
        kind,
        arguments,
        slot,
        names: names.into_iter().collect(),
        open,
    })
}

/// Most functions that a call is followed through by their jumps.
const MAX_FOLLOWED: usize = 16;

/// A jump through a pointer that may leave its function for good.
pub(super) struct Exit {
    pub(super) jump: Instruction,
    pub(super) kind: SiteKind,
    /// It is no switch, for sure: nothing of the function's is alive behind it
    /// that a call would clobber, in a register or below the stack pointer.
    pub(super) sure: bool,
}

/// The jumps through a pointer by which a call of `function` may go elsewhere,
/// its own and those of functions that it jumps to. `None` if they can't be
/// told.
pub(super) fn exits(code: &Code<'_>, function: u64) -> Option<Vec<Exit>> {
    let mut all = BTreeMap::new();
    let mut functions = vec![function];
    let mut next = 0;
    while let Some(&function) = functions.get(next) {
        next += 1;
        let root = index_of(code.extents, function)?;
        if code.extents[root].start != function || next > MAX_FOLLOWED {
            return None;
        }
        let (exits, on) = exits_of(code, root)?;
        all.extend(exits);
        for to in on {
            if !functions.contains(&to) {
                functions.push(to);
            }
        }
    }
    Some(all.into_values().collect())
}

/// The jumps through a pointer, by address, that leave the function at extent
/// `root`, and the functions that it jumps to.
pub(super) fn exits_of(
    code: &Code<'_>,
    root: usize,
) -> Option<(BTreeMap<u64, Exit>, BTreeSet<u64>)> {
    let mut machine = Machine::new(code.image, code.labels);
    let (mut exits, mut on) = (BTreeMap::new(), BTreeSet::new());
    code.run(root, &mut machine, &mut |machine, state, instruction| {
        if !at_entry_depth(state) {
            return;
        }
        if let Some(exit) = exit(code, root, machine, state, instruction) {
            exits.insert(instruction.ip(), exit);
        } else {
            on.extend(jump_out(code, instruction));
        }
    })?;
    Some((exits, on))
}

/// All calls through a pointer, and jumps through one that leave their
/// function, of all functions.
pub(super) fn indirect(code: &Code<'_>) -> BTreeMap<u64, SiteKind> {
    let mut all = BTreeMap::new();
    for (index, extent) in code.extents.iter().enumerate() {
        if !extent.function || !code.labels.has_indirect(extent.start, extent.end) {
            continue;
        }
        for i in code.decode(extent) {
            if let Some((kind @ (SiteKind::Call | SiteKind::ThunkCall), _)) = branch(code, &i) {
                all.insert(i.ip(), kind);
            }
        }
        let (exits, _) = exits_of(code, index).unwrap_or_default();
        let sure = exits.into_iter().filter(|(_, exit)| exit.sure);
        all.extend(sure.map(|(at, exit)| (at, exit.kind)));
    }
    all
}

/// The function that a direct jump at the entry's depth goes on in.
fn jump_out(code: &Code<'_>, instruction: &Instruction) -> Option<u64> {
    let jumps = matches!(
        instruction.flow_control(),
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
    ) && instruction.op0_kind() == OpKind::NearBranch64;
    let to = instruction.near_branch_target();
    let out = jumps && index_of(code.extents, to) != index_of(code.extents, instruction.ip());
    (out && code.labels.is_function(to)).then_some(to)
}

/// The jump at `instruction`, of the function at extent `root`, as an exit.
fn exit(
    code: &Code<'_>,
    root: usize,
    machine: &mut Machine<'_>,
    state: &State,
    instruction: &Instruction,
) -> Option<Exit> {
    let (kind, register) = branch(code, instruction)?;
    // `notrack` marks a switch.
    let marked = instruction.segment_prefix() == Register::DS && register.is_some();
    if marked || !matches!(kind, SiteKind::TailJump | SiteKind::ThunkJump) {
        return None;
    }
    let value = match register {
        Some(register) => number(register).map_or(Value::ANY, |n| state.registers[n]),
        None => {
            let place = machine.place(state, instruction);
            machine.load(state, place)
        }
    };
    let (targets, closed) = machine.sets.constants(value);
    if closed && !targets.is_empty() {
        return None;
    }
    let sure = match value {
        Value::Import | Value::Label(_) | Value::Entry(_) => return None,
        // Not from a table of labels.
        Value::Field(_) | Value::Global(_) | Value::Parameter(_) => true,
        _ => !code.has_table(root),
    };
    Some(Exit {
        jump: *instruction,
        kind,
        sure: sure && !code.has_inner_function(root),
    })
}

/// The kind of an indirect branch, and the register it goes through, if any.
fn branch(code: &Code<'_>, instruction: &Instruction) -> Option<(SiteKind, Option<Register>)> {
    let thunk = |kind| {
        let to = instruction.near_branch_target();
        code.labels.thunks.get(&to).map(|&r| (kind, Some(r)))
    };
    match instruction.code() {
        Opcode::Call_rm64 => Some((SiteKind::Call, register_target(instruction))),
        Opcode::Jmp_rm64 => Some((SiteKind::TailJump, register_target(instruction))),
        Opcode::Call_rel32_64 => thunk(SiteKind::ThunkCall),
        Opcode::Jmp_rel32_64 | Opcode::Jmp_rel8_64 => thunk(SiteKind::ThunkJump),
        _ => None,
    }
}

/// Where `faas_create_func_worker` stores its second and third parameter.
fn slots(code: &Code<'_>) -> Slots {
    let create = code
        .image
        .symbols
        .iter()
        .find(|s| s.exported && s.name == "faas_create_func_worker");
    let root = create
        .and_then(|s| index_of(code.extents, s.at).filter(|&i| code.extents[i].start == s.at));
    let Some(root) = root else {
        return Slots::default();
    };
    let mut machine = Machine::new(code.image, code.labels);
    machine.watch_parameters = true;
    if code.run(root, &mut machine, &mut |_, _, _| {}).is_none() {
        return Slots::default();
    }
    let only = |parameter: u8| {
        let slots: BTreeSet<Slot> = machine
            .parameter_stores
            .iter()
            .filter(|(number, _)| *number == parameter)
            .filter_map(|&(_, place)| match place {
                Place::Field(offset) => Some(Slot::Field(offset)),
                Place::Image { set, .. } => match *machine.sets.get(set) {
                    [at] => Some(Slot::Global(at)),
                    _ => None,
                },
                _ => None,
            })
            .collect();
        (slots.len() == 1).then(|| slots.first().copied()).flatten()
    };
    Slots {
        invoke: only(1),
        append: only(2),
    }
}
