//! What one instruction does to a [`State`].

mod vector;

use std::collections::HashSet;

use iced_x86::{Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use super::value::{MAX_SET, RSP, SetId, Sets, State, Value, number};
use crate::code::image::{Image, Stored};
use crate::code::labels::Labels;

/// Furthest that the entries of a table of names lie apart, in bytes.
const MAX_STRIDE: u64 = 64;

/// What a memory operand points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Place {
    /// A slot of the frame.
    Stack { region: u64, offset: i64 },
    /// Any slot of an array in the frame, this one or another.
    StackArray { region: u64, from: i64 },
    /// One of these addresses in the image, or an element of a table there.
    Image { set: SetId, indexed: bool },
    /// This far behind a pointer of unknown value.
    Field(i64),
    /// Anywhere else.
    Unknown,
}

/// Interprets instructions of one function.
pub(crate) struct Machine<'a> {
    pub(crate) image: &'a Image,
    pub(crate) labels: &'a Labels,
    pub(crate) sets: Sets,
    /// Whether to note where parameters are stored.
    pub(crate) watch_parameters: bool,
    /// Parameters that were stored outside the frame, and where.
    pub(crate) parameter_stores: HashSet<(u8, Place)>,
    info: InstructionInfoFactory,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(image: &'a Image, labels: &'a Labels) -> Machine<'a> {
        Machine {
            image,
            labels,
            sets: Sets::new(image.span()),
            watch_parameters: false,
            parameter_stores: HashSet::new(),
            info: InstructionInfoFactory::new(),
        }
    }

    fn value_of(state: &State, register: Register) -> Value {
        number(register).map_or(Value::ANY, |n| state.registers[n])
    }

    /// Whether a value is an address in the frame or in the image.
    fn is_table(&self, value: Value) -> bool {
        let (constants, _) = self.sets.constants(value);
        let in_image = |&at: &u64| self.image.bytes_from(at).is_some();
        matches!(
            value,
            Value::Stack { .. } | Value::Above { .. } | Value::Beyond(_)
        ) || constants.iter().any(in_image)
    }

    /// Where the memory operand of `instruction` points.
    pub(crate) fn place(&mut self, state: &State, instruction: &Instruction) -> Place {
        if matches!(instruction.segment_prefix(), Register::FS | Register::GS) {
            return Place::Unknown;
        }
        if instruction.is_ip_rel_memory_operand() {
            let Value::Constants { set, .. } = self.sets.one(instruction.ip_rel_memory_address())
            else {
                return Place::Unknown;
            };
            return Place::Image {
                set,
                indexed: false,
            };
        }
        if !instruction.memory_base().is_gpr64() {
            return Place::Unknown;
        }
        let mut displacement = instruction.memory_displacement64() as i64;
        let mut base = Self::value_of(state, instruction.memory_base());
        let mut indexed = false;
        if instruction.memory_index() != Register::None {
            let mut index = Self::value_of(state, instruction.memory_index());
            let scale = instruction.memory_index_scale();
            // `[index + table]` as well as `[table + index]`.
            if scale == 1 && !self.is_table(base) && self.is_table(index) {
                std::mem::swap(&mut base, &mut index);
            }
            match self.sets.single(index) {
                Some(constant) => {
                    let distance = constant.wrapping_mul(scale.into()) as i64;
                    displacement = displacement.wrapping_add(distance);
                }
                None => indexed = true,
            }
        }
        let moved = self.sets.map(
            base,
            |c| c.wrapping_add_signed(displacement),
            |o| o.checked_add(displacement),
        );
        match moved {
            Value::Constants { set, .. } if moved != Value::ANY => Place::Image { set, indexed },
            Value::Stack { region, offset } if !indexed => Place::Stack { region, offset },
            Value::Stack {
                region,
                offset: from,
            }
            | Value::Above { region, from } => Place::StackArray { region, from },
            Value::Beyond(base) => match self.sets.one(base) {
                Value::Constants { set, .. } => Place::Image { set, indexed: true },
                _ => Place::Unknown,
            },
            _ if indexed => Place::Unknown,
            _ => Place::Field(displacement),
        }
    }

    /// Eight bytes loaded from `place`.
    pub(crate) fn load(&mut self, state: &State, place: Place) -> Value {
        match place {
            Place::Stack { region, offset } => state.slot(region, offset),
            Place::Field(offset) => Value::Field(offset),
            Place::Unknown => Value::ANY,
            Place::StackArray { region, from } => self.array_element(state, region, from),
            Place::Image { set, indexed } => {
                let addresses = self.sets.get(set).to_vec();
                match addresses.as_slice() {
                    &[base] if indexed => self.table_element(base),
                    _ if indexed => Value::ANY,
                    addresses => self.load_constants(addresses),
                }
            }
        }
    }

    fn load_constants(&mut self, addresses: &[u64]) -> Value {
        let mut values = Vec::new();
        let mut open = false;
        for &at in addresses {
            let sealed = self.image.is_constant(at) || self.image.is_relro(at);
            match self.image.stored(at) {
                Some(Stored::Address(to)) => {
                    values.push(to);
                    open |= !sealed;
                }
                Some(Stored::Import) if addresses.len() == 1 => return Value::Import,
                None if sealed => match self.image.u64_at(at) {
                    Some(value) => values.push(value),
                    None => open = true,
                },
                None if addresses.len() == 1 => return Value::Global(at),
                _ => open = true,
            }
        }
        self.sets.of(values, open)
    }

    /// Any element of an array of names in the frame, which begins at `from`
    /// or about there.
    fn array_element(&mut self, state: &State, region: u64, from: i64) -> Value {
        let mut names = Vec::new();
        let mut last = None;
        for (offset, value) in state.slots_of(region) {
            let (constants, _) = self.sets.constants(value);
            let named = |at: &u64| self.image.name_at(*at).is_some();
            if constants.is_empty() || !constants.iter().all(named) {
                continue;
            }
            if last.is_some_and(|last: i64| last.checked_add(8) != Some(offset)) {
                // Another array: the former one was it if it reaches so far.
                if last >= Some(from) {
                    break;
                }
                names.clear();
            }
            names.extend_from_slice(constants);
            last = Some(offset);
        }
        if last < Some(from) {
            names.clear();
        }
        self.sets.of(names, true)
    }

    /// Any element of the table of pointers at `base`: names, or code.
    fn table_element(&mut self, base: u64) -> Value {
        let mut names = Vec::new();
        let mut last = base;
        for &(at, stored) in self.image.stored_in(base, base.saturating_add(4096)) {
            let Stored::Address(to) = stored else { break };
            if at - last > MAX_STRIDE || names.len() > MAX_SET {
                break;
            }
            if names.is_empty() && self.image.is_code(to) {
                return Value::Label(base);
            }
            if self.image.name_at(to).is_none() {
                break;
            }
            names.push(to);
            last = at;
        }
        self.sets.of(names, true)
    }

    /// `base + *(i32 *)(base + 4 * i)` for any `i`: names, or code.
    fn relative_element(&mut self, base: u64) -> Value {
        if self.labels.table(base).is_some() {
            return Value::Label(base);
        }
        let mut names = Vec::new();
        let mut at = base;
        while let Some(entry) = self.image.u32_at(at) {
            let to = base.wrapping_add_signed(i64::from(entry as i32));
            if self.image.name_at(to).is_none() || names.len() > MAX_SET {
                break;
            }
            names.push(to);
            at += 4;
        }
        self.sets.of(names, true)
    }

    fn store(&mut self, state: &mut State, place: Place, size: usize, value: Value) {
        if self.watch_parameters
            && let Value::Parameter(number) = value
            && matches!(place, Place::Field(_) | Place::Image { .. })
        {
            self.parameter_stores.insert((number, place));
        }
        if let Place::Stack { region, offset } = place {
            if size == 8 {
                state.set_slot(region, offset, value);
            } else {
                state.forget(region, offset, size as i64);
            }
        }
    }

    /// The value of operand `index`, as 64 bits; sources of 32 bits are
    /// zero-extended, smaller ones are any value.
    pub(crate) fn operand(
        &mut self,
        state: &State,
        instruction: &Instruction,
        index: u32,
    ) -> Value {
        match instruction.op_kind(index) {
            OpKind::Register => {
                let register = instruction.op_register(index);
                if register.is_gpr64() {
                    Self::value_of(state, register)
                } else if register.is_gpr32() {
                    self.narrow(Self::value_of(state, register))
                } else {
                    Value::ANY
                }
            }
            OpKind::Memory if instruction.memory_size().size() == 8 => {
                let place = self.place(state, instruction);
                self.load(state, place)
            }
            OpKind::Memory => Value::ANY,
            _ => {
                let value = instruction.immediate(index);
                self.sets.one(value)
            }
        }
    }

    /// The lower half of a value, zero-extended.
    fn narrow(&mut self, value: Value) -> Value {
        match value {
            Value::Constants { .. } => self.sets.map(value, |c| c & 0xffff_ffff, |_| None),
            Value::Undefined => Value::Undefined,
            _ => Value::ANY,
        }
    }

    /// Writes a register of any width.
    fn write(&mut self, state: &mut State, register: Register, value: Value, ip: u64) {
        let Some(number) = number(register) else {
            return;
        };
        let value = match register.size() {
            8 => value,
            4 => self.narrow(value),
            _ => Value::ANY,
        };
        // A stack pointer that can't be followed starts a region of its own.
        state.registers[number] = match value {
            Value::Stack { .. } => value,
            _ if number == RSP => Value::Stack {
                region: ip,
                offset: 0,
            },
            value => value,
        };
    }

    fn move_stack(&mut self, state: &mut State, by: i64) {
        let moved = self
            .sets
            .map(state.registers[RSP], |c| c, |o| o.checked_add(by));
        state.registers[RSP] = moved;
    }

    fn push(&mut self, state: &mut State, value: Value) {
        self.move_stack(state, -8);
        if let Value::Stack { region, offset } = state.registers[RSP] {
            state.set_slot(region, offset, value);
        }
    }

    fn pop(&mut self, state: &mut State) -> Value {
        let value = match state.registers[RSP] {
            Value::Stack { region, offset } => state.slot(region, offset),
            _ => Value::ANY,
        };
        self.move_stack(state, 8);
        value
    }

    /// Executes an instruction that falls through to the next one.
    pub(crate) fn step(&mut self, state: &mut State, i: &Instruction) {
        use Mnemonic as M;
        let ip = i.ip();
        let to_register = i.op0_kind() == OpKind::Register;
        match i.mnemonic() {
            M::Nop | M::Endbr64 | M::Cmp | M::Test | M::Vzeroupper => {}
            M::Mov
                if i.op1_kind() == OpKind::Register && i.op1_register().is_segment_register() =>
            {
                self.generic(state, i);
            }
            M::Mov if to_register => {
                let value = self.operand(state, i, 1);
                self.write(state, i.op0_register(), value, ip);
            }
            M::Mov => {
                let value = self.operand(state, i, 1);
                let place = self.place(state, i);
                self.store(state, place, i.memory_size().size(), value);
            }
            M::Lea => {
                let value = match self.place(state, i) {
                    Place::Stack { region, offset } => Value::Stack { region, offset },
                    Place::StackArray { region, from } => Value::Above { region, from },
                    Place::Image {
                        set,
                        indexed: false,
                    } => Value::Constants { set, open: false },
                    _ => self.lea_of_entry(state, i),
                };
                self.write(state, i.op0_register(), value, ip);
            }
            M::Add | M::Sub if to_register => {
                let value = self.sum(state, i);
                self.write(state, i.op0_register(), value, ip);
            }
            M::Add | M::Sub if i.memory_size().size() == 8 => {
                let value = self.sum(state, i);
                let place = self.place(state, i);
                self.store(state, place, 8, value);
            }
            M::Xor if to_register && same_register(i) => {
                let zero = self.sets.one(0);
                self.write(state, i.op0_register(), zero, ip);
            }
            M::Push => {
                let value = self.operand(state, i, 0);
                self.push(state, value);
            }
            M::Pop => {
                let value = self.pop(state);
                if to_register {
                    self.write(state, i.op0_register(), value, ip);
                } else {
                    let place = self.place(state, i);
                    self.store(state, place, 8, value);
                }
            }
            M::Leave => {
                let frame = state.registers[5];
                self.write(state, Register::RSP, frame, ip);
                let value = self.pop(state);
                self.write(state, Register::RBP, value, ip);
            }
            M::Xchg if to_register && i.op1_kind() == OpKind::Register => {
                let (a, b) = (self.operand(state, i, 0), self.operand(state, i, 1));
                self.write(state, i.op0_register(), b, ip);
                self.write(state, i.op1_register(), a, ip);
            }
            M::Movsxd if i.op1_kind() == OpKind::Memory => {
                let value = match self.place(state, i) {
                    Place::Image { set, .. } => match *self.sets.get(set) {
                        [base] => Value::Entry(base),
                        _ => Value::ANY,
                    },
                    _ => Value::ANY,
                };
                self.write(state, i.op0_register(), value, ip);
            }
            _ if i.is_string_instruction() => self.generic(state, i),
            M::Cmova
            | M::Cmovae
            | M::Cmovb
            | M::Cmovbe
            | M::Cmove
            | M::Cmovg
            | M::Cmovge
            | M::Cmovl
            | M::Cmovle
            | M::Cmovne
            | M::Cmovno
            | M::Cmovnp
            | M::Cmovns
            | M::Cmovo
            | M::Cmovp
            | M::Cmovs => {
                let (a, b) = (self.operand(state, i, 0), self.operand(state, i, 1));
                let value = self.sets.join(a, b);
                self.write(state, i.op0_register(), value, ip);
            }
            _ => {
                if !self.vector(state, i) {
                    self.generic(state, i);
                }
            }
        }
    }

    /// `lea r, [base + entry]`, the sum of a table and one of its entries.
    fn lea_of_entry(&mut self, state: &State, i: &Instruction) -> Value {
        let base = Self::value_of(state, i.memory_base());
        let index = Self::value_of(state, i.memory_index());
        if i.memory_index_scale() == 1 && i.memory_displacement64() == 0 {
            return self.add(base, index);
        }
        Value::ANY
    }

    fn add(&mut self, a: Value, b: Value) -> Value {
        match (a, b) {
            (Value::Entry(base), other) | (other, Value::Entry(base)) => {
                if self.sets.single(other) == Some(base) {
                    self.relative_element(base)
                } else {
                    Value::ANY
                }
            }
            (a, b) => match (self.sets.single(a), self.sets.single(b)) {
                (_, Some(c)) => {
                    self.sets
                        .map(a, |v| v.wrapping_add(c), |o| o.checked_add(c as i64))
                }
                (Some(c), None) => {
                    self.sets
                        .map(b, |v| v.wrapping_add(c), |o| o.checked_add(c as i64))
                }
                (None, None) => Value::ANY,
            },
        }
    }

    fn sum(&mut self, state: &State, i: &Instruction) -> Value {
        if i.mnemonic() == Mnemonic::Sub && same_register(i) {
            return self.sets.one(0);
        }
        let (a, b) = (self.operand(state, i, 0), self.operand(state, i, 1));
        if i.mnemonic() == Mnemonic::Sub {
            return match self.sets.single(b) {
                Some(c) => self
                    .sets
                    .map(a, |v| v.wrapping_sub(c), |o| o.checked_sub(c as i64)),
                None => Value::ANY,
            };
        }
        self.add(a, b)
    }

    /// Everything that an instruction writes becomes any value.
    fn generic(&mut self, state: &mut State, i: &Instruction) {
        let writes = |access| {
            matches!(
                access,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            )
        };
        let info = self.info.info(i);
        let stores = info.used_memory().iter().any(|m| writes(m.access()));
        let mut stack_pointer = false;
        for used in info.used_registers() {
            if !writes(used.access()) {
                continue;
            }
            let register = used.register();
            if let Some(number) = number(register) {
                stack_pointer |= number == RSP;
                state.registers[number] = Value::ANY;
            } else if register.is_vector_register() && register.number() < 16 {
                state.vectors[register.number()] = [Value::ANY; 2];
            }
        }
        if stack_pointer {
            state.registers[RSP] = Value::Stack {
                region: i.ip(),
                offset: 0,
            };
        }
        let explicit = (0..i.op_count()).any(|n| i.op_kind(n) == OpKind::Memory);
        if stores && explicit {
            let place = self.place(state, i);
            let size = i.memory_size().size().max(1);
            if let Place::Stack { region, offset } = place {
                state.forget(region, offset, size as i64);
            }
        }
    }
}

fn same_register(i: &Instruction) -> bool {
    i.op1_kind() == OpKind::Register && i.op0_register() == i.op1_register()
}
