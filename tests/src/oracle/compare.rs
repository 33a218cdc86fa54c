//! Our images beside those of ld.so.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result};
use nightgraft_patcher::Refused;
use nightgraft_patcher::elf::{Image, RelocationEntry, constants as c};
use nightgraft_patcher::load::interpose::{self, Interposed};
use nightgraft_patcher::load::{
    self, Given, GivenTls, Loaded, Meaning, Place, PrivateImage, Scope, TlsMeaning,
};
use nightgraft_patcher::snapshot::{Module, ProcMemory, Worker};

use super::content::Content;
use super::host::{Host, Object, Routines};
use super::tls;

/// Where the loader believes that it finds what the bridge gives: addresses
/// that nothing in a process has.
pub(super) const GIVEN: Given = Given {
    thunks: 0x1111_0000_0000_0000,
    environ: 0x2222_0000_0000_0000,
    modules: 0x3333_0000_0000_0000,
    tls_indices: 0x4444_0000_0000_0000,
    tls: GivenTls {
        get_addr: 0x5551_0000_0000_0000,
        dynamic: 0x5552_0000_0000_0000,
        fixed: 0x5553_0000_0000_0000,
        nowhere: 0x5554_0000_0000_0000,
    },
};

/// Most differences that are kept of an image.
const MOST: usize = 20;

/// Something that is not as ld.so made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The image's path.
    pub image: String,
    /// What differs: a relocation with its symbol, or a part of the image.
    pub what: String,
    /// What we would have made of it.
    pub ours: String,
    /// What ld.so made of it.
    pub live: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Difference {
            image,
            what,
            ours,
            live,
        } = self;
        write!(f, "{image}: {what}: {ours}, ld.so {live}")
    }
}

/// What came out of a comparison.
#[derive(Debug, Default)]
pub struct Compared {
    /// Relocated words compared.
    pub words: usize,
    /// Everything that differs, up to a bound per image.
    pub differences: Vec<Difference>,
    /// The first image that is refused, which is not compared.
    pub refused: Option<Refused>,
    /// One of the images wants static thread-local storage of its own.
    pub static_tls: bool,
}

/// The private images, at the addresses where ld.so has them.
pub(super) struct Relocated<'a> {
    modules: Vec<&'a Module>,
    images: Vec<Result<Loaded, Refused>>,
}

/// Relocates all private images.
pub(super) fn relocate<'a>(worker: &'a Worker, scope: &Scope) -> Relocated<'a> {
    let modules: Vec<&Module> = scope
        .images()
        .iter()
        .filter_map(|image| {
            let mut modules = worker.modules.iter();
            modules.find(|m| Arc::ptr_eq(&m.image, &image.image))
        })
        .collect();
    let bases: Vec<u64> = modules
        .iter()
        .map(|m| m.image.low().wrapping_add(m.bias))
        .collect();
    let images = scope.images().iter().enumerate().map(|(number, image)| {
        load::check(&image.path, &image.image)?;
        let place = Place {
            number,
            bases: &bases,
        };
        load::relocate(&image.path, &image.image, place, Some(scope), &GIVEN)
    });
    Relocated {
        images: images.collect(),
        modules,
    }
}

/// Compares them with what is live.
///
/// # Errors
/// The process dies or cannot be read.
pub(super) fn compare(
    host: &mut Host,
    worker: &Worker,
    scope: &Scope,
    relocated: Relocated<'_>,
) -> Result<Compared> {
    let mut compared = Compared::default();
    let Relocated { modules, images } = relocated;
    for module in &worker.modules[..worker.library] {
        compared.differences.extend(static_tls(host, module));
    }
    for (number, loaded) in images.into_iter().enumerate() {
        let own = &scope.images()[number];
        compared.static_tls |= wants_static_tls(scope, number);
        let loaded = match loaded {
            Ok(loaded) => loaded,
            Err(refused) => {
                compared.refused.get_or_insert(refused);
                continue;
            }
        };
        let memory = ProcMemory::open(host.pid())?;
        let object = *host
            .object(loaded.bias)
            .with_context(|| format!("the host knows no object at {:#x}", loaded.bias))?;
        let mut subject = Subject {
            ours: Content::ours(&own.image, &loaded),
            live: Content::live(&memory, &own.image, loaded.bias)?,
            host,
            worker,
            scope,
            modules: &modules,
            number,
            own,
            loaded: &loaded,
            words: 0,
            differences: Vec::new(),
        };
        subject.relocations()?;
        subject.rest(&object);
        compared.words += subject.words;
        compared.differences.append(&mut subject.differences);
    }
    Ok(compared)
}

/// Whether a relocation asks for the image's, or another private image's,
/// thread-local storage at a fixed distance from the thread pointer.
fn wants_static_tls(scope: &Scope, number: usize) -> bool {
    let relocations = &scope.images()[number].image.dynamic.relocations;
    let mut asks = relocations.iter().filter(|r| r.kind == c::R_X86_64_TPOFF64);
    asks.any(|r| matches!(scope.tls(number, r.symbol), Ok(TlsMeaning::Private { .. })))
}

/// A library of the worker's whose thread-local storage is not where the
/// snapshot takes it to be.
fn static_tls(host: &Host, module: &Module) -> Option<Difference> {
    let ours = module.tls_offset?;
    let block = host.object(module.bias)?.tls_block;
    let live = host.thread_pointer().wrapping_sub(block);
    (ours != live).then(|| Difference {
        image: module.path.clone(),
        what: "thread-local storage below the thread pointer".into(),
        ours: hex(ours),
        live: hex(live),
    })
}

/// Whether ld.so runs code of an image to relocate it.
fn has_resolvers(image: &Image) -> bool {
    let mut relocations = image.dynamic.relocations.iter();
    let mut symbols = image.symbols.iter();
    relocations.any(|r| r.kind == c::R_X86_64_IRELATIVE)
        || symbols.any(|s| s.kind == c::STT_GNU_IFUNC && !s.undefined())
}

/// One image under comparison.
pub(super) struct Subject<'a> {
    pub(super) host: &'a mut Host,
    pub(super) worker: &'a Worker,
    pub(super) scope: &'a Scope,
    /// The private images' modules, by number.
    pub(super) modules: &'a [&'a Module],
    pub(super) number: usize,
    pub(super) own: &'a PrivateImage,
    pub(super) loaded: &'a Loaded,
    pub(super) ours: Content,
    pub(super) live: Content,
    words: usize,
    differences: Vec<Difference>,
}

impl Subject<'_> {
    fn image(&self) -> &Image {
        &self.own.image
    }

    /// Every word that a relocation makes.
    fn relocations(&mut self) -> Result<()> {
        let resolvers: HashMap<u64, (u64, u64)> = self
            .loaded
            .ifuncs
            .iter()
            .map(|ifunc| (ifunc.slot, (ifunc.resolver, ifunc.addend)))
            .collect();
        let own = self.own;
        for entry in &own.image.dynamic.relocations {
            let at = entry.offset.wrapping_add(self.loaded.bias);
            let len = match entry.kind {
                c::R_X86_64_NONE => continue,
                c::R_X86_64_TLSDESC => 16,
                _ => 8,
            };
            self.words += 1;
            if tls::is(entry.kind) {
                self.tls(entry, at)?;
            } else {
                let (Some(live), Some(made)) = (self.live.word(at), self.ours.word(at)) else {
                    self.differ(entry, "no such word", "");
                    continue;
                };
                let ours = match (self.given(entry), resolvers.get(&at)) {
                    (Some((given, _)), _) if given != made => {
                        self.differ_at(entry, given, made);
                        continue;
                    }
                    (Some((_, own)), _) => self.value(own?)?.wrapping_add(addend(entry)),
                    (None, Some((resolver, addend))) => {
                        self.host.call(*resolver)?.wrapping_add(*addend)
                    }
                    (None, None) => made,
                };
                if ours != live {
                    self.differ_at(entry, ours, live);
                }
            }
            self.ours.settle(&self.live, at, len);
        }
        Ok(())
    }

    /// Where the word of an import that we give must point, and what the
    /// worker's own libraries have for it.
    fn given(&self, entry: &RelocationEntry) -> Option<(u64, Result<Meaning, Refused>)> {
        if matches!(
            entry.kind,
            c::R_X86_64_RELATIVE | c::R_X86_64_IRELATIVE | c::R_X86_64_SIZE64
        ) || entry.symbol == 0
        {
            return None;
        }
        let given = match self.scope.interposed(self.number, entry.symbol)? {
            Interposed::Function(index) => GIVEN.thunks + (index * interpose::THUNK) as u64,
            Interposed::Environ => GIVEN.environ,
            Interposed::TlsGetAddr => GIVEN.tls.get_addr,
        };
        let jump_slot = entry.kind == c::R_X86_64_JUMP_SLOT;
        let own = self.scope.meaning(self.number, entry.symbol, jump_slot);
        Some((given.wrapping_add(addend(entry)), own))
    }

    fn value(&mut self, meaning: Meaning) -> Result<u64> {
        let live = |image: usize, vaddr: u64| vaddr.wrapping_add(self.modules[image].bias);
        Ok(match meaning {
            Meaning::At(value) => value,
            Meaning::Private(image, vaddr) => live(image, vaddr),
            Meaning::Resolver(resolver) => self.host.call(resolver)?,
            Meaning::PrivateResolver(image, vaddr) => {
                let resolver = live(image, vaddr);
                self.host.call(resolver)?
            }
        })
    }

    /// Everything but relocations.
    fn rest(&mut self, object: &Object) {
        // ld.so keeps addresses in the dynamic section, and the host has
        // changed the initialisers there.
        let own = self.own;
        let image = &own.image;
        let dynamic = (image.dynamic_vaddr, image.dynamic_bytes);
        let at = dynamic.0.wrapping_add(self.loaded.bias);
        self.ours.settle(&self.live, at, dynamic.1 as usize);
        // Resolvers of its own have run there, and may have kept something.
        let writable = !has_resolvers(image);
        for (at, ours, live) in self.ours.differences(&self.live, writable, MOST) {
            let at = at.wrapping_sub(self.loaded.bias);
            self.push(
                format!("bytes at {at:#x} without a relocation"),
                format!("{ours:#018x}"),
                format!("{live:#018x}"),
            );
        }
        self.functions(object);
        self.protections();
        self.unwind(object);
    }

    /// Initialisers and what runs at exit.
    fn functions(&mut self, object: &Object) {
        let bias = self.loaded.bias;
        let array = |routines: &Routines| {
            let start = routines.array.wrapping_add(bias);
            (0..routines.bytes / 8)
                .map(move |index| start.wrapping_add(index * 8))
                .filter_map(|at| self.live.word(at))
                .filter(|function| !matches!(*function, 0 | u64::MAX))
                .collect::<Vec<u64>>()
        };
        let one = |routines: &Routines| {
            (routines.function != 0).then(|| routines.function.wrapping_add(bias))
        };
        let inits: Vec<u64> = one(&object.init)
            .into_iter()
            .chain(array(&object.init))
            .collect();
        // Termination functions in the opposite order.
        let finis: Vec<u64> = array(&object.fini)
            .into_iter()
            .rev()
            .chain(one(&object.fini))
            .collect();
        for (what, ours, live) in [
            ("initialisers", &self.loaded.inits, inits),
            ("termination functions", &self.loaded.finis, finis),
        ] {
            if *ours != live {
                self.push(what.into(), format!("{ours:x?}"), format!("{live:x?}"));
            }
        }
    }

    /// What may be written and executed, page by page.
    fn protections(&mut self) {
        let loaded = self.loaded;
        for segment in &loaded.segments {
            let end = segment.start + segment.len;
            let mut maps = self.worker.maps.iter().peekable();
            for page in (segment.start..end).step_by(0x1000) {
                while maps.peek().is_some_and(|map| map.end <= page) {
                    maps.next();
                }
                let map = maps.peek().filter(|map| map.start <= page);
                let live = map.map(|map| (map.writable, map.executable));
                let sealed = loaded
                    .relro
                    .is_some_and(|(start, len)| (start..start + len).contains(&page));
                let ours = (segment.writable && !sealed, segment.executable);
                if live != Some(ours) {
                    self.push(
                        format!("(writable, executable) of page {:#x}", page - loaded.bias),
                        format!("{ours:?}"),
                        format!("{live:?}"),
                    );
                    break;
                }
            }
        }
    }

    /// Where an unwinder finds the tables.
    fn unwind(&mut self, object: &Object) {
        let bias = self.loaded.bias;
        let header = self.image().eh_frame_header;
        let ours = header.map_or(0, |vaddr| vaddr.wrapping_add(bias));
        if ours != object.unwind {
            self.push("PT_GNU_EH_FRAME".into(), hex(ours), hex(object.unwind));
        }
        // The header's pointer, relative to where it stands.
        let word = self.live.word(object.unwind).map(u64::to_le_bytes);
        let (Some(ours), Some([1, 0x1b, _, _, a, b, c, d])) = (self.image().eh_frame(), word)
        else {
            return;
        };
        let pointer = i64::from(i32::from_le_bytes([a, b, c, d]));
        let live = (object.unwind + 4).wrapping_add_signed(pointer);
        if ours.wrapping_add(bias) != live {
            self.push(".eh_frame".into(), hex(ours.wrapping_add(bias)), hex(live));
        }
    }

    /// Counts a relocation's difference in a value that is an address.
    pub(super) fn differ_at(&mut self, entry: &RelocationEntry, ours: u64, live: u64) {
        let (ours, live) = (self.place(ours), self.place(live));
        self.differ(entry, &ours, &live);
    }

    /// Counts a relocation's difference.
    pub(super) fn differ(&mut self, entry: &RelocationEntry, ours: &str, live: &str) {
        let symbol = self.image().symbols.get(entry.symbol as usize);
        let symbol = symbol.filter(|s| !s.name.is_empty()).map(|s| {
            let version = s.version.as_deref().unwrap_or("");
            let at = if version.is_empty() { "" } else { "@" };
            format!(" of {}{at}{version}", s.name)
        });
        let what = format!(
            "relocation {} at {:#x}{}{:+#x}",
            kind_name(entry.kind),
            entry.offset,
            symbol.unwrap_or_default(),
            entry.addend.unwrap_or(0),
        );
        self.push(what, ours.to_owned(), live.to_owned());
    }

    fn push(&mut self, what: String, ours: String, live: String) {
        if self.differences.len() < MOST {
            self.differences.push(Difference {
                image: self.own.path.clone(),
                what,
                ours,
                live,
            });
        }
    }

    /// An address with the module that it lies in.
    fn place(&self, address: u64) -> String {
        let module = self.worker.modules.iter().find(|m| {
            let start = m.image.low().wrapping_add(m.bias);
            let end = m.image.high().wrapping_add(m.bias);
            (start..end).contains(&address)
        });
        match module {
            Some(m) => {
                let vaddr = address.wrapping_sub(m.bias);
                format!("{address:#x} ({}+{vaddr:#x})", m.short_name())
            }
            None => hex(address),
        }
    }
}

fn hex(value: u64) -> String {
    format!("{value:#x}")
}

/// What a relocation adds to its symbol's address.
fn addend(entry: &RelocationEntry) -> u64 {
    match entry.kind {
        c::R_X86_64_GLOB_DAT | c::R_X86_64_JUMP_SLOT => 0,
        _ => entry.addend.unwrap_or(0) as u64,
    }
}

fn kind_name(kind: u32) -> String {
    let name = match kind {
        c::R_X86_64_64 => "R_X86_64_64",
        c::R_X86_64_GLOB_DAT => "R_X86_64_GLOB_DAT",
        c::R_X86_64_JUMP_SLOT => "R_X86_64_JUMP_SLOT",
        c::R_X86_64_RELATIVE => "R_X86_64_RELATIVE",
        c::R_X86_64_IRELATIVE => "R_X86_64_IRELATIVE",
        c::R_X86_64_DTPMOD64 => "R_X86_64_DTPMOD64",
        c::R_X86_64_DTPOFF64 => "R_X86_64_DTPOFF64",
        c::R_X86_64_TPOFF64 => "R_X86_64_TPOFF64",
        c::R_X86_64_TLSDESC => "R_X86_64_TLSDESC",
        _ => return format!("R_X86_64_({kind})"),
    };
    name.to_owned()
}
