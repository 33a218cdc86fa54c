//! The plan of a patch that maps: where everything goes, the structures, the
//! stubs, the windows and the record.
//!
//! ```text
//!  stubs │ bridge (first patch only) │ guard │ image │ guard │ image … │ guard │ records │ control (first patch only)
//! ```
//!
//! One reservation near the caller's library holds all of it. What depends on
//! addresses is built twice: once at a made-up place to know its size, once
//! where it will be.

use std::mem::offset_of;

use nightgraft_bridge::abi;

use super::build::{
    Input, Sites, base, dependencies, in_order, other_slot, parent, stores as stores_of,
};
use super::images::{self, Records};
use super::layout::{self, Area, GraftFields, WorkerFields};
use super::led::Led;
use super::unwind;
use super::{Access, Mapping, Part, PatchPlan, Store, guard, modes, placement};
use crate::code::{Site, Tail, Window};
use crate::load::interpose::{self, module_at};
use crate::load::{self, Given, GivenTls, Loaded, Meaning, Place, PrivateImage, Scope};
use crate::manifest::{
    BridgeAddresses, GraftRecord, Manifest, Present, RECORD_FORMAT, Region, WindowRecord,
};
use crate::refused::Refused;
use crate::room;
use crate::snapshot::Worker;

const PAGE: u64 = 4096;
/// Room for one stub; the longest displaced code is far shorter.
const STUB: u64 = 512;
/// Outputs and copies of inputs may take so many bytes in a worker before
/// calls take the RPC; half of what its memory limit leaves if that is less.
const ARENA_BUDGET: u64 = 256 << 20;
/// Stack that a callee is given at least, where the worker's limit is the
/// usual 8 MiB: nearly what it has in a worker of its own.
const STACK: u64 = 7 << 20;
/// `RLIMIT_STACK` where there is none: what mmap leaves below the stack is
/// more.
const UNLIMITED_STACK: u64 = 8 << 20;

/// Addresses of everything that a fresh patch maps.
struct Places {
    reservation: Region,
    stubs: Region,
    bridge: u64,
    /// First pages of the images.
    images: Vec<u64>,
    /// All of them, with what lies between.
    image: Region,
    data: u64,
    control: Option<Region>,
}

/// The plan of a patch that maps the callee's image.
pub(super) fn fresh(
    input: &Input<'_>,
    sites: &Sites,
    entry: &Window,
    build_id: String,
) -> Result<PatchPlan, Refused> {
    let index = input.present.map_or(0, |p| p.manifest.grafts.len());
    if index >= abi::MAX_GRAFTS {
        return Err(Refused::TooManyGrafts {
            most: abi::MAX_GRAFTS,
        });
    }
    let scope = Scope::new(input.caller, input.callee)?;
    for image in scope.images() {
        load::check(&image.path, &image.image)?;
    }
    let graft = Some((index, build_id));
    mapped(input, &scope, sites, Some(entry), graft)
}

/// The plan that maps the bridge alone, into a worker that has none.
pub(super) fn bridge_alone(
    input: &Input<'_>,
    entry: Option<&Window>,
) -> Result<PatchPlan, Refused> {
    // What the bridge calls is what the worker's own libraries have.
    let scope = Scope::new(input.caller, input.caller)?;
    mapped(input, &scope, &Sites::default(), entry, None)
}

fn mapped(
    input: &Input<'_>,
    scope: &Scope,
    sites: &Sites,
    entry: Option<&Window>,
    graft: Option<(usize, String)>,
) -> Result<PatchPlan, Refused> {
    let present = input.present;
    let caller = input.caller.function();
    let invoke = input.invoke.clone()?;

    // The data's size does not depend on its address: build it twice, the
    // first time at a made-up place, to know how much room to look for.
    let known: Vec<&WindowRecord> = present
        .iter()
        .flat_map(|p| p.manifest.windows.iter())
        .collect();
    let bias = caller.bias;
    let new_sites: Vec<&(Site, Window)> = sites
        .usable
        .iter()
        .filter(|(_, w)| {
            known
                .iter()
                .all(|k| k.address != w.start.0.wrapping_add(bias))
        })
        .collect();
    let new_entry = known.iter().all(|k| !k.entry);
    let draft = Draft {
        input,
        scope,
        graft,
        invoke,
        sites: &new_sites,
        new_entry: entry.filter(|_| new_entry),
    };
    let trial = Places {
        reservation: Region { start: 0, len: 0 },
        stubs: Region {
            start: PAGE,
            len: draft.stub_len(),
        },
        bridge: PAGE,
        images: vec![PAGE; draft.images().len()],
        image: Region {
            start: PAGE,
            len: PAGE,
        },
        data: PAGE,
        control: None,
    };
    let data_len = draft.data(&trial, &draft.loaded(&trial)?)?.area.bytes.len() as u64;
    let places = place(input, &draft, data_len)?;
    draft.finish(&places, sites)
}

fn place(input: &Input<'_>, draft: &Draft<'_>, data_len: u64) -> Result<Places, Refused> {
    let caller = input.caller.function();
    let mut at = 0_u64;
    let mut take = |len: u64| {
        let start = at;
        at += len.next_multiple_of(PAGE);
        (start, len.next_multiple_of(PAGE))
    };
    let stubs = take(draft.stub_len());
    let bridge = match input.present {
        Some(_) => (0, 0),
        None => take(input.bridge.high() - input.bridge.low()),
    };
    // A page on either side that an image can run into without harm, and what
    // it takes to align it.
    let first = take(PAGE);
    let mut rooms = Vec::new();
    for image in draft.images() {
        let image = &image.image;
        rooms.push(take(image.high() - image.low() + image.alignment() - PAGE));
        take(PAGE);
    }
    let data = take(data_len);
    let control = input
        .present
        .is_none()
        .then(|| take(size_of::<abi::Control>() as u64));
    let len = at;
    let library = (
        caller.image.low().wrapping_add(caller.bias),
        caller.image.high().wrapping_add(caller.bias),
    );
    let start =
        placement::near(&input.caller.maps, library, len).ok_or_else(|| Refused::NoRoomNear {
            library: caller.path.clone(),
            bytes: len,
        })?;
    Ok(Places {
        reservation: Region { start, len },
        stubs: Region {
            start: start + stubs.0,
            len: stubs.1,
        },
        bridge: start + bridge.0,
        images: draft
            .images()
            .iter()
            .zip(&rooms)
            .map(|(image, (offset, _))| {
                let (low, align) = (image.image.low(), image.image.alignment());
                // As its first page is off in the file.
                let skew = low & (align - 1);
                (start + offset).wrapping_sub(skew).next_multiple_of(align) + skew
            })
            .collect(),
        image: Region {
            start: start + first.0 + PAGE,
            len: (data.0 - first.0).saturating_sub(2 * PAGE),
        },
        data: start + data.0,
        control: control.map(|(offset, len)| Region {
            start: start + offset,
            len,
        }),
    })
}

/// Everything that is fixed before the places are.
struct Draft<'a> {
    input: &'a Input<'a>,
    scope: &'a Scope,
    /// The index and build-id of the graft; `None` for the bridge alone.
    graft: Option<(usize, String)>,
    invoke: u64,
    sites: &'a [&'a (Site, Window)],
    new_entry: Option<&'a Window>,
}

struct Data {
    area: Area,
    stub_eh_frame: u64,
    graft: u64,
    /// The image's `faas_func_call`.
    function: u64,
    worker: u64,
    /// Record of the function's entry.
    entry: u64,
    sites: Vec<u64>,
    bridge: BridgeAddresses,
    control: u64,
}

impl Draft<'_> {
    fn stub_len(&self) -> u64 {
        (self.thunks_len() + (self.sites.len() as u64 + 1) * STUB).next_multiple_of(PAGE)
    }

    fn thunks_len(&self) -> u64 {
        self.images().len() as u64 * images::THUNKS
    }

    fn images(&self) -> &[PrivateImage] {
        match self.graft {
            Some(_) => self.scope.images(),
            None => &[],
        }
    }

    fn bridge(&self, places: &Places) -> Result<BridgeAddresses, Refused> {
        if let Some(present) = self.input.present {
            return Ok(present.manifest.bridge.clone());
        }
        let bias = places.bridge.wrapping_sub(self.input.bridge.low());
        let export = |name: &str| {
            load::export(self.input.bridge, name)
                .map(|at| at.wrapping_add(bias))
                .ok_or_else(|| Refused::MissingExport {
                    library: "the bridge".into(),
                    symbol: name.into(),
                })
        };
        let given = TLS_EXPORTS.into_iter().chain([guard::ROUTINE]);
        let given = given.chain(interpose::FUNCTIONS.iter().map(|f| f.export));
        Ok(BridgeAddresses {
            enter: export("ng_enter")?,
            called: export("ng_called")?,
            routine: export("ng_routine")?,
            exports: given
                .map(|name| Ok((name.to_owned(), export(name)?)))
                .collect::<Result<_, Refused>>()?,
        })
    }

    fn records(&self, places: &Places) -> (Area, Records) {
        let mut area = Area::new(places.data);
        let records = match self.graft {
            Some(_) => images::reserve(&mut area, self.scope),
            None => Records::default(),
        };
        (area, records)
    }

    fn loaded(&self, places: &Places) -> Result<Vec<Loaded>, Refused> {
        let (_, records) = self.records(places);
        let bridge = self.bridge(places)?;
        let [get_addr, dynamic, fixed, nowhere] = TLS_EXPORTS;
        let tls = GivenTls {
            get_addr: given(&bridge, get_addr)?,
            dynamic: given(&bridge, dynamic)?,
            fixed: given(&bridge, fixed)?,
            nowhere: given(&bridge, nowhere)?,
        };
        let images = self.images().iter().enumerate();
        images
            .map(|(number, image)| {
                let given = Given {
                    thunks: places.stubs.start + number as u64 * images::THUNKS,
                    environ: records.graft + offset_of!(abi::Graft, environ) as u64,
                    modules: records.modules,
                    tls_indices: records.tls_indices[number],
                    tls,
                };
                let place = Place {
                    number,
                    bases: &places.images,
                };
                load::relocate(&image.path, &image.image, place, Some(self.scope), &given)
            })
            .collect()
    }

    fn data(&self, places: &Places, loaded: &[Loaded]) -> Result<Data, Refused> {
        let bridge = self.bridge(places)?;
        let (mut area, records) = self.records(places);
        let graft = records.graft;
        let control = match self.input.present {
            Some(present) => present.manifest.control,
            None => places.control.map_or(0, |c| c.start),
        };
        let worker = match self.input.present {
            Some(present) => present.manifest.worker,
            None => area.reserve(size_of::<abi::Worker>(), 64),
        };
        let entry = area.reserve(size_of::<abi::Routine>(), align_of::<abi::Routine>());
        area.put_u64(entry + offset_of!(abi::Routine, worker) as u64, worker);
        let sites: Vec<u64> = self
            .sites
            .iter()
            .map(|_| area.reserve(size_of::<abi::Site>(), align_of::<abi::Site>()))
            .collect();
        let mut data = Data {
            area,
            stub_eh_frame: 0,
            graft,
            function: 0,
            worker,
            entry,
            sites,
            bridge,
            control,
        };
        if let Some((index, _)) = self.graft {
            self.graft_data(&mut data, &records, index, loaded)?;
        }
        if self.input.present.is_none() {
            self.worker_data(places, &mut data)?;
        }
        let bias = self.input.caller.function().bias;
        for ((site, _), at) in self.sites.iter().zip(&data.sites) {
            let by_pointer = self.cached(site).map_or(0, |name| name.wrapping_add(bias));
            layout::site(&mut data.area, *at, by_pointer, graft, worker);
        }
        Ok(data)
    }

    /// The graft's records.
    fn graft_data(
        &self,
        data: &mut Data,
        records: &Records,
        index: usize,
        loaded: &[Loaded],
    ) -> Result<(), Refused> {
        let (caller, callee) = (self.input.caller, self.input.callee);
        let area = &mut data.area;
        // As its caller passes it.
        let name = self.input.name.rsplit('/').next().unwrap_or_default();
        let name = area.string(name.as_bytes());
        let images = images::write(area, records, self.scope, loaded);
        data.stub_eh_frame =
            area.reserve(unwind::size(self.sites.iter().map(|(_, window)| window)), 8);
        let argv = area.strings(&callee.arguments);
        let environ = area.strings(&callee.environment);
        let image = &callee.function().image;
        let own = |symbol: &str| {
            load::export(image, symbol)
                .map(|at| at.wrapping_add(loaded[0].bias))
                .ok_or_else(|| Refused::MissingExport {
                    library: callee.function().path.clone(),
                    symbol: symbol.into(),
                })
        };
        let edges = offset_of!(abi::Control, edges) + index * size_of::<abi::SharedEdge>();
        data.function = own("faas_func_call")?;
        GraftFields {
            shared: data.control + edges as u64,
            worker: data.worker,
            call: if self.input.wanted.guard {
                given(&data.bridge, guard::ROUTINE)?
            } else {
                data.function
            },
            function: data.function,
            name,
            faas_init: own("faas_init")?,
            faas_create: own("faas_create_func_worker")?,
            images,
            stub_eh_frame: if self.sites.is_empty() {
                0
            } else {
                data.stub_eh_frame
            },
            parent: parent(self.input)?,
            arguments: (argv, callee.arguments.len() as u64),
            environ,
            index: index as u64,
            // Below another graft it is that one's code that makes the call.
            mxcsr_fixed: parent(self.input)? == 0 && modes::mxcsr_is_fixed(caller, self.scope),
        }
        .write(area, data.graft);
        Ok(())
    }

    /// The worker's record, in a worker that has none.
    fn worker_data(&self, places: &Places, data: &mut Data) -> Result<(), Refused> {
        let caller = self.input.caller;
        let function = |name: &str| match self.scope.library_function(name)? {
            Meaning::Resolver(at) => Ok((at, true)),
            Meaning::At(at) | Meaning::Private(_, at) | Meaning::PrivateResolver(_, at) => {
                Ok((at, false))
            }
        };
        let bridge_bias = places.bridge.wrapping_sub(self.input.bridge.low());
        let outermost = caller.executable();
        WorkerFields {
            control: data.control,
            invoke: self.invoke,
            stack_floor: stack_floor(caller)?,
            text: (
                outermost.image.low().wrapping_add(outermost.bias),
                outermost.image.high().wrapping_add(outermost.bias),
            ),
            imports: imports(caller, self.scope)?,
            eh_frame: (self.input.bridge.eh_frame()).map_or(0, |at| at.wrapping_add(bridge_bias)),
            memcpy: function("memcpy")?,
            arena_budget: self
                .input
                .memory_room
                .map_or(ARENA_BUDGET, |room| ARENA_BUDGET.min(room / 2)),
            graft: data.graft,
        }
        .write(&mut data.area, data.worker);
        Ok(())
    }

    /// The image address of the callee's name, where the bytes cannot change.
    fn cached(&self, site: &Site) -> Option<u64> {
        let library = &self.input.caller.function().image;
        site.names
            .iter()
            .find(|n| n.text == self.input.name && library.read_only(n.at.0))
            .map(|n| n.at.0)
    }

    fn stubs(&self, places: &Places, data: &Data) -> Result<Stubs, Refused> {
        let library = self.input.caller.function();
        let bias = library.bias;
        let mut bytes = Vec::new();
        let modules = self.records(places).1.modules;
        for number in 0..self.images().len() {
            let at = |name: &str| given(&data.bridge, name);
            bytes.extend(images::thunks(module_at(modules, number), at)?);
        }
        let (mut records, mut frames) = (Vec::new(), Vec::new());
        let entry = self.new_entry.map(|w| (w, 0, Vec::new(), None));
        let sites = self
            .sites
            .iter()
            .zip(&data.sites)
            .map(|((site, window), at)| {
                (
                    window,
                    *at,
                    site.names.iter().map(|n| n.text.clone()).collect(),
                    Some(site),
                )
            });
        for (window, site, names, of) in entry.into_iter().chain(sites) {
            bytes.resize(bytes.len().next_multiple_of(16), 0xcc);
            let at = places.stubs.start + bytes.len() as u64;
            let failed = |reason: String| Refused::NoWindow {
                library: library.path.clone(),
                at: window.start.0,
                reason,
            };
            let entry = of.is_none();
            let tail = if entry {
                Tail::Called {
                    flag: data.worker + offset_of!(abi::Worker, dirty) as u64,
                    record: data.entry,
                    bridge_entry: data.bridge.called,
                }
            } else {
                Tail::Bridge {
                    site_record: site,
                    bridge_entry: data.bridge.enter,
                }
            };
            let stub = window
                .stub(bias, at, &tail)
                .map_err(|e| failed(e.to_string()))?;
            if stub.bytes.len() as u64 > STUB {
                return Err(failed(format!("its stub has {} bytes", stub.bytes.len())));
            }
            let led = Led {
                window,
                bias,
                stub: at,
            };
            let copies = stub.boundaries.iter();
            let record = WindowRecord {
                entry,
                site,
                copies: copies
                    .map(|(from, to)| (*from, at + u64::from(*to)))
                    .collect(),
                names,
                cached: of
                    .and_then(|site| self.cached(site))
                    .map(|_| self.input.name.to_owned()),
                ..WindowRecord::default()
            };
            records.extend(led.records(record).map_err(|e| failed(e.to_string()))?);
            if !entry {
                frames.extend(unwind::frames(&led, &stub));
            }
            bytes.extend(stub.bytes);
        }
        Ok(Stubs {
            bytes,
            windows: records,
            eh_frame: unwind::eh_frames(&frames),
        })
    }

    fn finish(&self, places: &Places, sites: &Sites) -> Result<PatchPlan, Refused> {
        let input = self.input;
        let loaded = self.loaded(places)?;
        let mut data = self.data(places, &loaded)?;
        let stubs = self.stubs(places, &data)?;
        if self.graft.is_some() {
            data.area.put(data.stub_eh_frame, &stubs.eh_frame);
        }
        let new_windows = stubs.windows;
        if let Some(&(_, resume)) = new_windows
            .iter()
            .find(|w| w.entry)
            .and_then(|w| w.copies.first())
        {
            let field = data.entry + offset_of!(abi::Routine, resume) as u64;
            data.area.put_u64(field, resume);
        }

        let mut parts = vec![part(
            "stubs",
            places.stubs,
            Access::ReadExecute,
            stubs.bytes,
        )];
        if input.present.is_none() {
            let place = Place {
                number: 0,
                bases: &[places.bridge],
            };
            let given = Given::default();
            let mut bridge = load::relocate("the bridge", input.bridge, place, None, &given)?;
            // How the personality routine finds the worker's record.
            bridge
                .set_constant(input.bridge, "ng_worker", data.worker)
                .ok_or_else(|| Refused::MissingExport {
                    library: "the bridge".into(),
                    symbol: "ng_worker".into(),
                })?;
            for segment in bridge.segments {
                // Its only writable words are relocations, applied by now.
                let access = if segment.executable {
                    Access::ReadExecute
                } else {
                    Access::Read
                };
                let region = Region {
                    start: segment.start,
                    len: segment.len,
                };
                parts.push(part("bridge", region, access, segment.bytes));
            }
        }
        for (image, loaded) in self.images().iter().zip(&loaded) {
            for segment in &loaded.segments {
                let access = match (segment.writable, segment.executable) {
                    (true, _) => Access::ReadWrite,
                    (false, true) => Access::ReadExecute,
                    (false, false) => Access::Read,
                };
                let region = Region {
                    start: segment.start,
                    len: segment.len,
                };
                parts.push(part(&image.path, region, access, segment.bytes.clone()));
            }
        }
        let data_len = (data.area.bytes.len() as u64).next_multiple_of(PAGE);
        let region = Region {
            start: places.data,
            len: data_len,
        };
        let records = std::mem::take(&mut data.area.bytes);
        parts.push(part("records", region, Access::ReadWrite, records));

        let mut manifest = match input.present {
            Some(present) => present.manifest.clone(),
            None => Manifest {
                version: abi::BRIDGE_VERSION,
                format: RECORD_FORMAT,
                generation: 0,
                pid: input.caller.pid,
                start_time: input.caller.start_time,
                library: input.caller.function().path.clone(),
                control: data.control,
                worker: data.worker,
                bridge: data.bridge.clone(),
                regions: Vec::new(),
                windows: Vec::new(),
                grafts: Vec::new(),
            },
        };
        let mut windows: Vec<WindowRecord> = manifest
            .windows
            .iter()
            .enumerate()
            .filter(|(i, w)| {
                let ours = w.serves_all() || w.passed_by(input.name);
                let there = |p: &Present| p.in_place(*i) || p.is_gone(*i);
                ours && !input.present.is_some_and(there)
            })
            .map(|(_, w)| w.clone())
            .collect();
        windows.extend(new_windows.iter().cloned());
        manifest.regions.push(places.reservation);
        manifest.windows.extend(new_windows);
        let record = match &self.graft {
            Some((index, build_id)) => Some(self.record(places, &data, *index, build_id)?),
            None => None,
        };
        if let Some(record) = &record {
            for old in manifest
                .grafts
                .iter_mut()
                .filter(|g| g.callee == input.name)
            {
                old.replaced = true;
            }
            manifest.grafts.push(record.clone());
        }
        let stores = match (input.present, &record) {
            (Some(_), Some(record)) => {
                let mut stores = imports_found(input.caller, manifest.worker);
                stores.extend(stores_of(&manifest, record));
                stores
            }
            _ => Vec::new(),
        };
        let gate = match &record {
            Some(record) => manifest.gate(record),
            None => manifest.observing(),
        };

        let sum = |of: &dyn Fn(&Loaded) -> usize| loaded.iter().map(of).sum::<usize>();
        let plan = PatchPlan {
            build_id: record.map(|r| r.build_id).unwrap_or_default(),
            mapping: Some(Mapping {
                reservation: places.reservation,
                parts,
                control: places.control,
                thread_field: input
                    .present
                    .is_none()
                    .then(|| data.worker + offset_of!(abi::Worker, thread) as u64),
            }),
            relocations: (
                sum(&|l| l.relocations - l.ifuncs.len()),
                sum(&|l| l.ifuncs.len()),
            ),
            initialisers: sum(&|l| l.inits.len()),
            libraries: self
                .images()
                .iter()
                .skip(1)
                .map(|image| image.path.clone())
                .collect(),
            stores,
            windows: in_order(windows),
            unfused: sites.unfused.clone(),
            gate,
            slot: other_slot(input.present),
            ..base(input, manifest)
        };
        plan.manifest.encode()?;
        (input.address_room).is_enough(plan.mapped_bytes(), plan.writable_bytes())?;
        room::fits(plan.resident_bytes(), input.memory_room)?;
        Ok(plan)
    }

    /// What is recorded of the graft.
    fn record(
        &self,
        places: &Places,
        data: &Data,
        index: usize,
        build_id: &str,
    ) -> Result<GraftRecord, Refused> {
        let input = self.input;
        Ok(GraftRecord {
            callee: input.name.into(),
            parent: parent(input)?,
            build_id: build_id.into(),
            dependencies: dependencies(input.callee)?,
            library: input.callee.function().path.clone(),
            graft: data.graft,
            call: data.function,
            index,
            slot: self.slot(),
            image: places.image,
            replaced: false,
        })
    }

    /// The place in the table of grafts: the older image's, or a new one.
    fn slot(&self) -> usize {
        let grafts = self.input.present.map_or(&[][..], |p| &p.manifest.grafts);
        let old = grafts
            .iter()
            .find(|g| !g.replaced && g.callee == self.input.name);
        old.map_or_else(
            || grafts.iter().map(|g| g.slot + 1).max().unwrap_or(0),
            |g| g.slot,
        )
    }
}

fn part(what: &str, region: Region, access: Access, bytes: Vec<u8>) -> Part {
    Part {
        what: what.to_owned(),
        start: region.start,
        len: region.len,
        access,
        bytes,
    }
}

/// What the bridge does for thread-local storage.
const TLS_EXPORTS: [&str; 4] = [
    "ng_tls_get_addr",
    "ng_tlsdesc_dynamic",
    "ng_tlsdesc_static",
    "ng_tlsdesc_undefweak",
];

/// Live address of what an image is bound to.
fn given(bridge: &BridgeAddresses, name: &str) -> Result<u64, Refused> {
    let found = bridge.exports.get(name).copied();
    found.ok_or_else(|| Refused::OtherBridge {
        found: format!("a bridge without {name}"),
    })
}

/// The worker may have loaded an unwinder since its bridge was mapped.
pub(super) fn imports_found(caller: &Worker, worker: u64) -> Vec<Store> {
    let found = optional_imports(caller).into_iter().enumerate();
    found
        .filter(|(_, address)| *address != 0)
        .map(|(index, address)| Store {
            address: worker + (offset_of!(abi::Worker, imports) + index * 8) as u64,
            bytes: address.to_le_bytes().into(),
            what: format!("address of {}", abi::IMPORTS[index]),
        })
        .collect()
}

struct Stubs {
    /// Thunks and stubs.
    bytes: Vec<u8>,
    windows: Vec<WindowRecord>,
    eh_frame: Vec<u8>,
}

/// Functions of the worker's libraries that the bridge calls.
fn imports(caller: &Worker, scope: &Scope) -> Result<[u64; abi::IMPORTS.len()], Refused> {
    let mut imports = optional_imports(caller);
    for (import, name) in imports
        .iter_mut()
        .zip(abi::IMPORTS)
        .take(abi::REQUIRED_IMPORTS)
    {
        *import = match scope.library_function(name)? {
            Meaning::At(at) => at,
            _ => {
                return Err(Refused::UnsupportedImport {
                    library: "the bridge".into(),
                    symbol: name.into(),
                    reason: "is chosen at run time (an indirect function)".into(),
                });
            }
        };
    }
    Ok(imports)
}

/// Those of libraries that a worker may do without, 0 for what is not there.
fn optional_imports(caller: &Worker) -> [u64; abi::IMPORTS.len()] {
    let mut imports = [0; abi::IMPORTS.len()];
    let libraries = ["libgcc_s.so.1", "libstdc++.so.6"];
    let loaded: Vec<_> = caller
        .modules
        .iter()
        .filter(|m| libraries.contains(&m.short_name()))
        .collect();
    for (import, name) in imports
        .iter_mut()
        .zip(abi::IMPORTS)
        .skip(abi::REQUIRED_IMPORTS)
    {
        let found = loaded.iter().find_map(|m| load::exported_by(m, name));
        *import = found.unwrap_or(0);
    }
    imports
}

/// Lowest stack pointer with which a callee may be started.
fn stack_floor(worker: &Worker) -> Result<u64, Refused> {
    let stack = worker
        .maps
        .iter()
        .find(|m| m.name == "[stack]")
        .ok_or_else(|| Refused::Analysis {
            library: worker.executable().path.clone(),
            reason: "the worker has no [stack]".into(),
        })?;
    let limit = if worker.stack_limit == u64::MAX {
        UNLIMITED_STACK
    } else {
        worker.stack_limit
    };
    Ok(stack
        .end
        .saturating_sub(limit)
        .saturating_add(STACK.min(limit / 8 * 7)))
}
