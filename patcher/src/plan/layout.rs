//! The structures that the bridge reads, as bytes for another process.

use std::mem::offset_of;

use nightgraft_bridge::abi::{Graft, IMPORTS, IfuncSlot, Site, Worker};

use super::images::ImageFields;

/// Bytes that will lie at a known live address, growing.
#[derive(Debug)]
pub(super) struct Area {
    /// Live address of the first byte.
    pub(super) base: u64,
    /// Contents.
    pub(super) bytes: Vec<u8>,
}

impl Area {
    pub(super) fn new(base: u64) -> Area {
        Area {
            base,
            bytes: Vec::new(),
        }
    }

    /// Reserves zeroed room and gives its live address.
    pub(super) fn reserve(&mut self, len: usize, align: usize) -> u64 {
        let at = self.bytes.len().next_multiple_of(align);
        self.bytes.resize(at + len, 0);
        self.base + at as u64
    }

    /// Stores bytes at a live address inside what was reserved.
    pub(super) fn put(&mut self, address: u64, bytes: &[u8]) {
        let at = (address - self.base) as usize;
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn put_u64(&mut self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }

    /// Appends bytes and a NUL.
    pub(super) fn string(&mut self, text: &[u8]) -> u64 {
        let at = self.reserve(text.len() + 1, 1);
        self.put(at, text);
        at
    }

    /// Appends a NULL-terminated array of strings, as `argv` and `environ`.
    pub(super) fn strings(&mut self, texts: &[Vec<u8>]) -> u64 {
        let array = self.reserve((texts.len() + 1) * 8, 8);
        for (index, text) in texts.iter().enumerate() {
            let at = self.string(text);
            self.put_u64(array + index as u64 * 8, at);
        }
        array
    }

    pub(super) fn words(&mut self, words: impl ExactSizeIterator<Item = u64>) -> u64 {
        let array = self.reserve(words.len() * 8, 8);
        for (index, word) in words.enumerate() {
            self.put_u64(array + index as u64 * 8, word);
        }
        array
    }
}

/// What the patcher fills of a [`Worker`]; live addresses.
pub(super) struct WorkerFields {
    pub(super) control: u64,
    pub(super) invoke: u64,
    pub(super) stack_floor: u64,
    pub(super) text: (u64, u64),
    pub(super) imports: [u64; IMPORTS.len()],
    pub(super) eh_frame: u64,
    pub(super) memcpy: (u64, bool),
    pub(super) arena_budget: u64,
    /// Its first graft; 0 for none yet.
    pub(super) graft: u64,
}

impl WorkerFields {
    pub(super) fn write(&self, area: &mut Area, at: u64) {
        let fields = [
            (offset_of!(Worker, control), self.control),
            (offset_of!(Worker, invoke), self.invoke),
            (offset_of!(Worker, stack_floor), self.stack_floor),
            (offset_of!(Worker, text_low), self.text.0),
            (offset_of!(Worker, text_high), self.text.1),
            (offset_of!(Worker, eh_frame), self.eh_frame),
            (
                offset_of!(Worker, memcpy),
                if self.memcpy.1 { 0 } else { self.memcpy.0 },
            ),
            (
                offset_of!(Worker, memcpy_resolver),
                if self.memcpy.1 { self.memcpy.0 } else { 0 },
            ),
            (offset_of!(Worker, arena_budget), self.arena_budget),
            (offset_of!(Worker, grafts), self.graft),
        ];
        for (offset, value) in fields {
            area.put_u64(at + offset as u64, value);
        }
        for (index, import) in self.imports.iter().enumerate() {
            let offset = offset_of!(Worker, imports) + index * 8;
            area.put_u64(at + offset as u64, *import);
        }
        let count = u8::from(self.graft != 0);
        area.put(at + offset_of!(Worker, count) as u64, &[count]);
    }
}

/// What the patcher fills of a [`Graft`]; live addresses.
pub(super) struct GraftFields {
    pub(super) shared: u64,
    pub(super) worker: u64,
    /// What a call calls: `function`, or the bridge's routine for guarded ones.
    pub(super) call: u64,
    pub(super) function: u64,
    pub(super) name: u64,
    pub(super) faas_init: u64,
    pub(super) faas_create: u64,
    pub(super) images: ImageFields,
    pub(super) stub_eh_frame: u64,
    pub(super) parent: u64,
    pub(super) arguments: (u64, u64),
    pub(super) environ: u64,
    pub(super) index: u64,
    pub(super) mxcsr_fixed: bool,
}

impl GraftFields {
    pub(super) fn write(&self, area: &mut Area, at: u64) {
        let fields = [
            (offset_of!(Graft, shared), self.shared),
            (offset_of!(Graft, worker), self.worker),
            (offset_of!(Graft, call), self.call),
            (offset_of!(Graft, function), self.function),
            (offset_of!(Graft, name), self.name),
            (offset_of!(Graft, faas_init), self.faas_init),
            (offset_of!(Graft, faas_create), self.faas_create),
            (offset_of!(Graft, modules), self.images.modules.0),
            (offset_of!(Graft, module_count), self.images.modules.1),
            (offset_of!(Graft, init_order), self.images.init_order.0),
            (
                offset_of!(Graft, init_order_count),
                self.images.init_order.1,
            ),
            (offset_of!(Graft, scope), self.images.scope.0),
            (offset_of!(Graft, scope_count), self.images.scope.1),
            (offset_of!(Graft, tls_count), self.images.tls_count),
            (offset_of!(Graft, stub_eh_frame), self.stub_eh_frame),
            (offset_of!(Graft, parent), self.parent),
            (offset_of!(Graft, argc), self.arguments.1),
            (offset_of!(Graft, argv), self.arguments.0),
            (offset_of!(Graft, environ), self.environ),
            (offset_of!(Graft, index), self.index),
            (offset_of!(Graft, mxcsr_fixed), u64::from(self.mxcsr_fixed)),
        ];
        for (offset, value) in fields {
            area.put_u64(at + offset as u64, value);
        }
    }
}

/// Writes a [`Site`].
pub(super) fn site(area: &mut Area, at: u64, name: u64, graft: u64, worker: u64) {
    area.put_u64(at + offset_of!(Site, name) as u64, name);
    area.put_u64(at + offset_of!(Site, graft) as u64, graft);
    area.put_u64(at + offset_of!(Site, worker) as u64, worker);
}

/// Writes the [`IfuncSlot`]s.
pub(super) fn ifuncs(area: &mut Area, slots: &[crate::load::Ifunc]) -> u64 {
    let array = area.reserve(size_of_val(slots).max(1), 8);
    for (index, slot) in slots.iter().enumerate() {
        let at = array + (index * size_of::<IfuncSlot>()) as u64;
        area.put_u64(at + offset_of!(IfuncSlot, slot) as u64, slot.slot);
        area.put_u64(at + offset_of!(IfuncSlot, resolver) as u64, slot.resolver);
        area.put_u64(at + offset_of!(IfuncSlot, addend) as u64, slot.addend);
    }
    array
}
