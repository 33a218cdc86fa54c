//! What a register or a stack slot may hold.

use std::collections::HashMap;
use std::ops::Range;

use iced_x86::Register;

/// Most constants that are kept apart for one place.
pub(crate) const MAX_SET: usize = 8;
/// Most stack slots whose value is remembered.
const MAX_SLOTS: usize = 256;

/// An abstract value. Joins only ever go up this order: one of the exact
/// kinds, a set that grows and opens (or a range that widens),
/// [`Value::Many`], [`Value::Undefined`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Value {
    /// Clobbered by a call on some way here: whoever passes this on as an
    /// argument does not mean it.
    Undefined,
    /// Any of more constants than are kept apart, or anything else.
    Many,
    /// One of the constants of a set; `open` if it may be something else too.
    /// Any value at all is the empty open set.
    Constants { set: SetId, open: bool },
    /// An address in the frame: bytes from where `rsp` pointed at the entry
    /// (region 0), or from where the instruction at `region` put it.
    Stack { region: u64, offset: i64 },
    /// Any of several addresses in a region of the frame, at this offset or
    /// above: a pointer that walks through an array there.
    Above { region: u64, from: i64 },
    /// Any of many addresses in the image, this one or above.
    Beyond(u64),
    /// What the caller passed in the argument register of this number (0-5).
    Parameter(u8),
    /// Loaded from this many bytes behind a pointer of unknown value.
    Field(i64),
    /// Loaded from this address in the image.
    Global(u64),
    /// The address of a function in another object.
    Import,
    /// A 32-bit entry of the relative table at this address.
    Entry(u64),
    /// Where the jump table at this address leads.
    Label(u64),
}

/// A set of constants in [`Sets`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct SetId(u32);

/// The set that holds nothing.
const EMPTY: SetId = SetId(0);

impl Value {
    /// Any value at all.
    pub(crate) const ANY: Value = Value::Constants {
        set: EMPTY,
        open: true,
    };
}

/// The sets of constants of one function, each stored once.
pub(crate) struct Sets {
    list: Vec<Box<[u64]>>,
    ids: HashMap<Box<[u64]>, SetId>,
    /// Addresses of the image.
    image: Range<u64>,
}

impl Sets {
    /// No sets yet; constants within `image` are addresses.
    pub(crate) fn new(image: Range<u64>) -> Sets {
        let mut sets = Sets {
            list: Vec::new(),
            ids: HashMap::new(),
            image,
        };
        sets.intern(&[]);
        sets
    }

    fn intern(&mut self, sorted: &[u64]) -> SetId {
        if let Some(&id) = self.ids.get(sorted) {
            return id;
        }
        let id = SetId(u32::try_from(self.list.len()).unwrap_or(0));
        self.list.push(sorted.into());
        self.ids.insert(sorted.into(), id);
        id
    }

    pub(crate) fn get(&self, id: SetId) -> &[u64] {
        &self.list[id.0 as usize]
    }

    pub(crate) fn one(&mut self, value: u64) -> Value {
        Value::Constants {
            set: self.intern(&[value]),
            open: false,
        }
    }

    /// The value that is one of `values`, or something else if `open`.
    pub(crate) fn of(&mut self, mut values: Vec<u64>, open: bool) -> Value {
        values.sort_unstable();
        values.dedup();
        if values.len() > MAX_SET {
            let addresses = values.iter().all(|v| self.image.contains(v));
            return match values.first() {
                Some(&first) if addresses => Value::Beyond(first),
                _ => Value::Many,
            };
        }
        Value::Constants {
            set: self.intern(&values),
            open,
        }
    }

    /// The constants of a value, and whether there is nothing else.
    pub(crate) fn constants(&self, value: Value) -> (&[u64], bool) {
        match value {
            Value::Constants { set, open } => (self.get(set), !open),
            _ => (&[], false),
        }
    }

    /// The only constant that a value can be.
    pub(crate) fn single(&self, value: Value) -> Option<u64> {
        match self.constants(value) {
            (&[only], true) => Some(only),
            _ => None,
        }
    }

    pub(crate) fn join(&mut self, a: Value, b: Value) -> Value {
        use Value::{Above, Beyond, Constants, Many, Stack, Undefined};
        match (a, b) {
            _ if a == b => a,
            (Undefined, _) | (_, Undefined) => Undefined,
            (Many, _) | (_, Many) => Many,
            (Constants { set: s, open: o }, Constants { set: t, open: p }) => {
                if s == t {
                    return Constants {
                        set: s,
                        open: o || p,
                    };
                }
                let mut union = self.get(s).to_vec();
                union.extend_from_slice(self.get(t));
                self.of(union, o || p)
            }
            (Beyond(a), Beyond(b)) => Beyond(a.min(b)),
            (Beyond(a), Constants { set, .. }) | (Constants { set, .. }, Beyond(a)) => {
                let lowest = self
                    .get(set)
                    .iter()
                    .filter(|c| self.image.contains(c))
                    .min();
                Beyond(lowest.map_or(a, |&low| low.min(a)))
            }
            (Constants { set, .. }, _) | (_, Constants { set, .. }) => {
                Constants { set, open: true }
            }
            (Beyond(a), _) | (_, Beyond(a)) => Beyond(a),
            (
                Stack {
                    region: r,
                    offset: a,
                }
                | Above { region: r, from: a },
                Stack {
                    region: s,
                    offset: b,
                }
                | Above { region: s, from: b },
            ) if r == s => Above {
                region: r,
                from: a.min(b),
            },
            _ => Value::ANY,
        }
    }

    /// Applies `f` to every constant, and to an address in the frame `g`.
    pub(crate) fn map(
        &mut self,
        value: Value,
        f: impl Fn(u64) -> u64,
        g: impl Fn(i64) -> Option<i64>,
    ) -> Value {
        match value {
            Value::Constants { set, open } => {
                let mapped = self.get(set).iter().map(|&c| f(c)).collect();
                self.of(mapped, open)
            }
            Value::Stack { region, offset } => match g(offset) {
                Some(offset) => Value::Stack { region, offset },
                None => Value::ANY,
            },
            Value::Above { region, from } => match g(from) {
                Some(from) => Value::Above { region, from },
                None => Value::ANY,
            },
            Value::Beyond(at) => Value::Beyond(f(at)),
            Value::Undefined | Value::Many => value,
            _ => Value::ANY,
        }
    }
}

/// Registers and the frame at one point of a function.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct State {
    /// General registers in encoding order (rax, rcx, rdx, rbx, rsp, …).
    pub(crate) registers: [Value; 16],
    /// The two lower quadwords of the vector registers.
    pub(crate) vectors: [[Value; 2]; 16],
    /// Slots of the frame of which something is known, by region and offset.
    slots: Vec<((u64, i64), Value)>,
}

/// Argument registers in order, by encoding: rdi, rsi, rdx, rcx, r8, r9.
pub(crate) const ARGUMENTS: [usize; 6] = [7, 6, 2, 1, 8, 9];
/// rsp's number in the encoding.
pub(crate) const RSP: usize = 4;

/// The 64-bit register of this encoding (0-15).
pub(crate) fn gpr(number: usize) -> Register {
    const ALL: [Register; 16] = [
        Register::RAX,
        Register::RCX,
        Register::RDX,
        Register::RBX,
        Register::RSP,
        Register::RBP,
        Register::RSI,
        Register::RDI,
        Register::R8,
        Register::R9,
        Register::R10,
        Register::R11,
        Register::R12,
        Register::R13,
        Register::R14,
        Register::R15,
    ];
    ALL[number & 15]
}

/// The encoding of a general register of any width.
pub(crate) fn number(register: Register) -> Option<usize> {
    if !register.is_gpr() {
        return None;
    }
    let full = register.full_register();
    (0..16).find(|&n| gpr(n) == full)
}

impl State {
    /// The state at a function's entry.
    pub(crate) fn entry() -> State {
        let mut registers = [Value::ANY; 16];
        for (argument, &register) in ARGUMENTS.iter().enumerate() {
            registers[register] = Value::Parameter(argument as u8);
        }
        registers[RSP] = Value::Stack {
            region: 0,
            offset: 0,
        };
        State {
            registers,
            vectors: [[Value::ANY; 2]; 16],
            slots: Vec::new(),
        }
    }

    pub(crate) fn slot(&self, region: u64, offset: i64) -> Value {
        match self
            .slots
            .binary_search_by_key(&(region, offset), |slot| slot.0)
        {
            Ok(index) => self.slots[index].1,
            Err(_) => Value::ANY,
        }
    }

    /// The slots of a region, by offset.
    pub(crate) fn slots_of(&self, region: u64) -> impl Iterator<Item = (i64, Value)> {
        let slots = self.slots.iter();
        slots
            .filter(move |slot| slot.0.0 == region)
            .map(|slot| (slot.0.1, slot.1))
    }

    /// Forgets what `size` bytes at `offset` held.
    pub(crate) fn forget(&mut self, region: u64, offset: i64, size: i64) {
        self.slots.retain(|&((r, o), _)| {
            r != region || o >= offset.saturating_add(size) || o.saturating_add(8) <= offset
        });
    }

    pub(crate) fn set_slot(&mut self, region: u64, offset: i64, value: Value) {
        self.forget(region, offset, 8);
        // What is not remembered reads as any value.
        if matches!(value, Value::Undefined | Value::ANY) || self.slots.len() == MAX_SLOTS {
            return;
        }
        let index = self.slots.partition_point(|s| s.0 < (region, offset));
        self.slots.insert(index, ((region, offset), value));
    }

    /// Joins `other` into this state; whether anything changed. With `widen`,
    /// whatever still changes is given up, so that a fixed point is near.
    pub(crate) fn join(&mut self, other: &State, sets: &mut Sets, widen: bool) -> bool {
        let mut changed = false;
        let mut merge = |mine: &mut Value, theirs: Value| {
            let joined = sets.join(*mine, theirs);
            if joined != *mine {
                *mine = match joined {
                    Value::Undefined => Value::Undefined,
                    _ if widen => Value::Many,
                    joined => joined,
                };
                changed = true;
            }
        };
        for (mine, &theirs) in self.registers.iter_mut().zip(&other.registers) {
            merge(mine, theirs);
        }
        for (mine, theirs) in self.vectors.iter_mut().zip(&other.vectors) {
            merge(&mut mine[0], theirs[0]);
            merge(&mut mine[1], theirs[1]);
        }
        for (place, mine) in &mut self.slots {
            merge(mine, other.slot(place.0, place.1));
        }
        // A slot known only there is any value here; its constants are kept
        // as possible ones, for the paths that never store to it never read it.
        for &(place, theirs) in &other.slots {
            if self.slots.binary_search_by_key(&place, |s| s.0).is_err()
                && self.slots.len() < MAX_SLOTS
                && let Value::Constants { set, .. } = theirs
            {
                let index = self.slots.partition_point(|s| s.0 < place);
                self.slots
                    .insert(index, (place, Value::Constants { set, open: true }));
                changed = true;
            }
        }
        changed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn joins_go_up_and_end() {
        let mut sets = Sets::new(0x1000..0x9000);
        let one = sets.one(1);
        let two = sets.one(2);
        let both = sets.join(one, two);
        assert_eq!(sets.constants(both), (&[1, 2][..], true));
        let open = sets.join(both, Value::Field(8));
        assert_eq!(sets.constants(open), (&[1, 2][..], false));
        assert_eq!(sets.join(open, one), open);
        let mut grown = one;
        for constant in 2..=9 {
            let next = sets.one(constant);
            grown = sets.join(grown, next);
        }
        assert_eq!(grown, Value::Many);
        assert_eq!(sets.join(grown, one), Value::Many);
        let mut walking = sets.one(0x2000);
        for step in 1..=9 {
            let next = sets.one(0x2000 + 8 * step);
            walking = sets.join(walking, next);
        }
        assert_eq!(walking, Value::Beyond(0x2000));
        let slot = |offset| Value::Stack { region: 0, offset };
        let above = Value::Above {
            region: 0,
            from: -16,
        };
        assert_eq!(sets.join(slot(-8), slot(-16)), above);
        assert_eq!(sets.join(above, slot(0)), above);
        assert_eq!(sets.join(Value::Undefined, one), Value::Undefined);
        assert_eq!(
            sets.join(Value::Parameter(1), Value::Parameter(2)),
            Value::ANY
        );
    }

    #[test]
    fn a_store_forgets_what_it_overlaps() {
        let mut sets = Sets::new(0x1000..0x9000);
        let mut state = State::entry();
        let one = sets.one(1);
        state.set_slot(0, -8, one);
        state.set_slot(0, -16, one);
        assert_eq!(state.slot(0, -8), one);
        state.forget(0, -12, 4);
        assert_eq!(state.slot(0, -16), Value::ANY);
        assert_eq!(state.slot(0, -8), one);
        state.forget(0, -1, 1);
        assert_eq!(state.slot(0, -8), Value::ANY);
    }
}
