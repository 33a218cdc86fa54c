//! Relocations for thread-local storage: the words differ, what they stand for
//! must not.
//!
//! ```text
//!             ours                      ld.so
//!  DTPMOD64   an image's record         the module's number
//!             "at a fixed place"        … of a library of the worker's
//!             … or the same number
//!  DTPOFF64   offset in the block       the same
//!             … from the thread pointer offset in the block, which has a place
//!  TPOFF64    … from the thread pointer the same
//!  TLSDESC    either                    what calling the descriptor yields
//! ```

use anyhow::Result;
use nightgraft_patcher::elf::{RelocationEntry, constants as c};
use nightgraft_patcher::load::{TlsMeaning, TlsSlot, interpose};

use super::compare::{GIVEN, Subject};

/// Whether a relocation is one for thread-local storage.
pub(super) fn is(kind: u32) -> bool {
    matches!(
        kind,
        c::R_X86_64_DTPMOD64 | c::R_X86_64_DTPOFF64 | c::R_X86_64_TPOFF64 | c::R_X86_64_TLSDESC
    )
}

impl Subject<'_> {
    /// The relocation at the live address `at`.
    pub(super) fn tls(&mut self, entry: &RelocationEntry, at: u64) -> Result<()> {
        let meaning = match self.scope.tls(self.number, entry.symbol) {
            Ok(meaning) => meaning,
            Err(refused) => {
                self.differ(entry, &refused.to_string(), "");
                return Ok(());
            }
        };
        let (Some(made), Some(live)) = (self.ours.word(at), self.live.word(at)) else {
            self.differ(entry, "no such word", "");
            return Ok(());
        };
        match (entry.kind, meaning) {
            (c::R_X86_64_DTPMOD64, TlsMeaning::Private { image, .. }) => {
                let record = interpose::module_at(GIVEN.modules, image);
                if made != record {
                    self.differ_at(entry, made, record);
                }
                let module = self.module(image);
                if module == 0 || live != module {
                    let ours = format!("module {module} ({})", self.modules[image].path);
                    self.differ(entry, &ours, &format!("module {live}"));
                }
            }
            (c::R_X86_64_DTPMOD64, TlsMeaning::Static(_)) => {
                // Which of them shows at the offset beside it.
                if self.fixed(live).is_none() {
                    self.differ(entry, "a fixed place", &format!("module {live}"));
                }
            }
            (c::R_X86_64_DTPOFF64, TlsMeaning::Static(_)) => {
                let module = self.live.word(at.wrapping_sub(8)).unwrap_or(0);
                let live = self.fixed(module).map(|block| block.wrapping_add(live));
                if live != Some(made) {
                    self.differ(entry, &format!("{made:#x}"), &format!("{live:x?}"));
                }
            }
            (c::R_X86_64_TLSDESC, meaning) => self.descriptor(entry, at, meaning)?,
            // An offset, or nothing written.
            _ => {
                if made != live {
                    self.differ_at(entry, made, live);
                }
            }
        }
        Ok(())
    }

    fn descriptor(&mut self, entry: &RelocationEntry, at: u64, meaning: TlsMeaning) -> Result<()> {
        let live = self.host.descriptor(at)?;
        let function = self.ours.word(at).unwrap_or(0);
        let argument = self.ours.word(at.wrapping_add(8)).unwrap_or(0);
        let (wanted, ours) = match meaning {
            TlsMeaning::Private { image, .. } => {
                let slot = self.slot(argument);
                let record = interpose::module_at(GIVEN.modules, image);
                let Some(slot) = slot.filter(|slot| slot.module == record) else {
                    self.differ(entry, "another image's", &self.modules[image].path);
                    return Ok(());
                };
                let module = self.module(image);
                if module == 0 {
                    self.differ(entry, "no thread-local storage", &format!("{live:#x}"));
                    return Ok(());
                }
                (GIVEN.tls.dynamic, self.host.tls(module, slot.offset)?)
            }
            TlsMeaning::Static(_) => (GIVEN.tls.fixed, argument),
            TlsMeaning::Linker { .. } => {
                let Some(slot) = self.slot(argument) else {
                    self.differ(entry, "no slot", &format!("{live:#x}"));
                    return Ok(());
                };
                (GIVEN.tls.dynamic, self.host.tls(slot.module, slot.offset)?)
            }
            // The address is the addend alone.
            TlsMeaning::Nowhere => (
                GIVEN.tls.nowhere,
                argument.wrapping_sub(self.host.thread_pointer()),
            ),
        };
        if function != wanted {
            self.differ_at(entry, function, wanted);
        }
        if ours != live {
            self.differ(entry, &format!("{ours:#x}"), &format!("{live:#x}"));
        }
        Ok(())
    }

    /// What the argument of a descriptor of ours stands for.
    fn slot(&self, argument: u64) -> Option<TlsSlot> {
        let index = argument.wrapping_sub(GIVEN.tls_indices) / 16;
        self.loaded.tls_indices.get(index as usize).copied()
    }

    /// The number of a private image's thread-local storage; 0 for none.
    fn module(&self, image: usize) -> u64 {
        let object = self.host.object(self.modules[image].bias);
        object.map_or(0, |object| object.tls_module)
    }

    /// Where the storage of a library that the process started with lies,
    /// relative to the thread pointer.
    fn fixed(&self, module: u64) -> Option<u64> {
        let object = self.host.tls_object(module)?;
        let fixed = self.host.started_with(object.bias) && object.tls_block != 0;
        fixed.then(|| object.tls_block.wrapping_sub(self.host.thread_pointer()))
    }
}
