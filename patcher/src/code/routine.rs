//! The worker's executable, as far as its `invoke_func` routine goes.
//!
//! No sites are looked for here. What enters the routine's first bytes is
//! known from the same labels as in a library: every direct branch, jump
//! table, landing pad and taken address of the whole text.

use std::collections::BTreeSet;

use iced_x86::{FlowControl, Instruction, Mnemonic, OpKind};

use super::extents::{Extent, extents};
use super::flow::{ARGUMENTS, Code, Machine, Value};
use super::image::{Image, Stored};
use super::labels::{Labels, collect};
use super::window::{NoWindow, Window, of_routine};
use super::{CodeError, ImageAddress};

/// An executable, at fixed addresses or not.
pub struct Executable {
    image: Image,
    extents: Vec<Extent>,
    labels: Labels,
}

impl Executable {
    /// Reads an ELF64 executable for x86-64.
    ///
    /// # Errors
    /// [`CodeError`] if the file is none, or not well-formed where it is read.
    pub fn parse(file: &[u8]) -> Result<Executable, CodeError> {
        let image = Image::parse_as(file, true)?;
        let extents = extents(&image)?;
        let (extents, labels) = collect(&image, extents)?;
        Ok(Executable {
            image,
            extents,
            labels,
        })
    }

    fn code(&self) -> Code<'_> {
        Code::new(&self.image, &self.extents, &self.labels)
    }

    /// The window at the entry of the function at `function`.
    ///
    /// # Errors
    /// [`NoWindow`] if no function begins there, or there is no room.
    pub fn window(&self, function: ImageAddress) -> Result<Window, NoWindow> {
        if !self.begins(function.0) {
            return Err(NoWindow::Undecodable { at: function });
        }
        of_routine(&self.code(), function.0)
    }

    /// Whether a function begins at `at`, by unwind information or a symbol.
    fn begins(&self, at: u64) -> bool {
        self.extents
            .binary_search_by_key(&at, |e| e.start)
            .is_ok_and(|i| self.extents[i].function && !self.extents[i].guessed)
    }

    /// What a call of `faas_create_func_worker` passes as `invoke_func`: the
    /// second argument of every call through a pointer that has two different
    /// functions of this executable as its second and third argument, and a
    /// first and fourth that are none. Ascending; one, unless something is odd.
    #[must_use]
    pub fn passed_to_create(&self) -> Vec<ImageAddress> {
        let code = self.code();
        let mut found = BTreeSet::new();
        for (index, extent) in self.extents.iter().enumerate() {
            let indirect = self.labels.has_indirect(extent.start, extent.end);
            if !extent.function || !indirect || !self.takes_two_functions(&code, extent) {
                continue;
            }
            let mut machine = Machine::new(&self.image, &self.labels);
            // A function too tangled to be followed is none that creates.
            let _ = code.run(index, &mut machine, &mut |machine, state, instruction| {
                if instruction.flow_control() != FlowControl::IndirectCall {
                    return;
                }
                let value = |n: usize| state.registers[ARGUMENTS[n]];
                let function = |value: Value| {
                    let at = machine.sets.single(value)?;
                    self.begins(at).then_some(at)
                };
                let (Some(invoke), Some(append)) = (function(value(1)), function(value(2))) else {
                    return;
                };
                let other = |n: usize| value(n) != Value::Undefined && function(value(n)).is_none();
                if invoke != append && other(0) && other(3) {
                    found.insert(ImageAddress(invoke));
                }
            });
        }
        found.into_iter().collect()
    }

    /// Whether two addresses of functions are taken in `extent`.
    fn takes_two_functions(&self, code: &Code<'_>, extent: &Extent) -> bool {
        let taken = |i: &Instruction| {
            if !i.is_ip_rel_memory_operand() || i.op0_kind() != OpKind::Register {
                return None;
            }
            let at = i.ip_rel_memory_address();
            let function = match i.mnemonic() {
                Mnemonic::Lea => at,
                Mnemonic::Mov => match self.image.stored(at)? {
                    Stored::Address(to) => to,
                    _ => return None,
                },
                _ => return None,
            };
            self.begins(function).then_some(function)
        };
        // Where the executable lies at fixed addresses they are immediates.
        let immediate = |i: &Instruction| {
            let wide = matches!(i.op1_kind(), OpKind::Immediate32 | OpKind::Immediate32to64);
            (i.mnemonic() == Mnemonic::Mov && i.op0_kind() == OpKind::Register && wide)
                .then(|| i.immediate(1))
                .filter(|at| self.begins(*at))
        };
        let all = code.decode(extent);
        let functions: BTreeSet<u64> = all
            .iter()
            .filter_map(|i| taken(i).or_else(|| immediate(i)))
            .collect();
        functions.len() > 1
    }
}
