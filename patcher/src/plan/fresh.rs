//! The plan of a patch that maps: where everything goes, the structures, the
//! stubs, the windows and the record.
//!
//! ```text
//!  stubs │ bridge (first patch only) │ guard │ image │ guard │ records │ control (first patch only)
//! ```
//!
//! One reservation near the caller's library holds all of it. What depends on
//! addresses is built twice: once at a made-up place to know its size, once
//! where it will be.

use std::mem::offset_of;

use nightgraft_bridge::abi;

use super::build::{Input, Sites, base, in_order, other_slot, stores};
use super::layout::{self, Area, GraftFields, WorkerFields};
use super::{Access, Mapping, Part, PatchPlan, modes, placement};
use crate::code::{Site, Tail, Window, WindowKind};
use crate::load::{self, Given, Loaded, Meaning, Scope};
use crate::manifest::{BridgeAddresses, GraftRecord, Manifest, Region, WindowRecord};
use crate::refused::Refused;
use crate::snapshot::Worker;

const PAGE: u64 = 4096;
/// Room for one stub; the longest displaced code is far shorter.
const STUB: u64 = 512;
/// Room for an image's `getenv` thunk.
const THUNK: u64 = 32;
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
    image: Region,
    data: u64,
    control: Option<Region>,
}

pub(super) fn fresh(
    input: &Input<'_>,
    sites: &Sites,
    entry: &Window,
    build_id: String,
) -> Result<PatchPlan, Refused> {
    let present = input.present;
    let caller = input.caller.function();
    let callee = input.callee.function();
    let invoke = input.invoke.clone()?;
    let index = present.map_or(0, |p| p.manifest.grafts.len());
    if index >= abi::MAX_GRAFTS {
        return Err(Refused::TooManyGrafts {
            most: abi::MAX_GRAFTS,
        });
    }
    let scope = Scope::new(input.caller, input.callee)?;

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
        scope: &scope,
        invoke,
        index,
        sites: &new_sites,
        new_entry: new_entry.then_some(entry),
    };
    let trial = Places {
        reservation: Region { start: 0, len: 0 },
        stubs: Region {
            start: PAGE,
            len: draft.stub_len(),
        },
        bridge: PAGE,
        image: Region {
            start: PAGE,
            len: callee.image.high() - callee.image.low(),
        },
        data: PAGE,
        control: None,
    };
    let data_len = draft.data(&trial, &draft.loaded(&trial)?)?.area.bytes.len() as u64;
    let places = place(input, &draft, data_len)?;
    draft.finish(&places, sites, build_id)
}

fn place(input: &Input<'_>, draft: &Draft<'_>, data_len: u64) -> Result<Places, Refused> {
    let caller = input.caller.function();
    let image = &input.callee.function().image;
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
    // A page on either side that the image can run into without harm.
    take(PAGE);
    let image_at = take(image.high() - image.low());
    take(PAGE);
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
        image: Region {
            start: start + image_at.0,
            len: image_at.1,
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
    invoke: u64,
    index: usize,
    sites: &'a [&'a (Site, Window)],
    new_entry: Option<&'a Window>,
}

struct Data {
    area: Area,
    graft: u64,
    worker: u64,
    sites: Vec<u64>,
    bridge: BridgeAddresses,
    control: u64,
}

impl Draft<'_> {
    fn stub_len(&self) -> u64 {
        (THUNK + (self.sites.len() as u64 + 1) * STUB).next_multiple_of(PAGE)
    }

    fn bridge(&self, places: &Places) -> Result<BridgeAddresses, Refused> {
        if let Some(present) = self.input.present {
            return Ok(present.manifest.bridge);
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
        Ok(BridgeAddresses {
            enter: export("ng_enter")?,
            hook: export("ng_hook")?,
            routine: export("ng_routine")?,
            getenv: export("ng_getenv")?,
        })
    }

    /// The structure's address is the first thing in the data.
    fn graft_at(places: &Places) -> u64 {
        places.data
    }

    fn loaded(&self, places: &Places) -> Result<Loaded, Refused> {
        let callee = self.input.callee.function();
        let given = Given {
            getenv: places.stubs.start,
            environ: Self::graft_at(places) + offset_of!(abi::Graft, environ) as u64,
        };
        load::relocate(
            &callee.path,
            &callee.image,
            places.image.start,
            Some(self.scope),
            given,
        )
    }

    fn data(&self, places: &Places, loaded: &Loaded) -> Result<Data, Refused> {
        let (caller, callee) = (self.input.caller, self.input.callee);
        let bridge = self.bridge(places)?;
        let mut area = Area::new(places.data);
        let graft = area.reserve(size_of::<abi::Graft>(), align_of::<abi::Graft>());
        let control = match self.input.present {
            Some(present) => present.manifest.control,
            None => places.control.map_or(0, |c| c.start),
        };
        let worker = match self.input.present {
            Some(present) => present.manifest.worker,
            None => area.reserve(size_of::<abi::Worker>(), 64),
        };
        let sites: Vec<u64> = self
            .sites
            .iter()
            .map(|_| area.reserve(size_of::<abi::Site>(), align_of::<abi::Site>()))
            .collect();
        let name = area.string(self.input.name.as_bytes());
        let ifuncs = layout::ifuncs(&mut area, &loaded.ifuncs);
        let inits = area.words(loaded.inits.iter().copied());
        let argv = area.strings(&callee.arguments);
        let environ = area.strings(&callee.environment);
        let image = &callee.function().image;
        let own = |symbol: &str| {
            load::export(image, symbol)
                .map(|at| at.wrapping_add(loaded.bias))
                .ok_or_else(|| Refused::MissingExport {
                    library: callee.function().path.clone(),
                    symbol: symbol.into(),
                })
        };
        let edges = offset_of!(abi::Control, edges) + self.index * size_of::<abi::SharedEdge>();
        GraftFields {
            shared: control + edges as u64,
            worker,
            call: own("faas_func_call")?,
            name,
            faas_init: own("faas_init")?,
            faas_create: own("faas_create_func_worker")?,
            ifuncs: (ifuncs, loaded.ifuncs.len() as u64),
            relro: loaded.relro.unwrap_or_default(),
            inits: (inits, loaded.inits.len() as u64),
            arguments: (argv, callee.arguments.len() as u64),
            environ,
            index: self.index as u64,
            mxcsr_fixed: modes::mxcsr_is_fixed(caller, callee),
        }
        .write(&mut area, graft);
        if self.input.present.is_none() {
            let function = |name: &str| match self.scope.library_function(name)? {
                Meaning::Resolver(at) => Ok((at, true)),
                Meaning::At(at) | Meaning::Own(at) | Meaning::OwnResolver(at) => Ok((at, false)),
            };
            let outermost = caller.executable();
            WorkerFields {
                control,
                invoke: self.invoke,
                stack_floor: stack_floor(caller)?,
                text: (
                    outermost.image.low().wrapping_add(outermost.bias),
                    outermost.image.high().wrapping_add(outermost.bias),
                ),
                pthread_create: function("pthread_create")?.0,
                pthread_detach: function("pthread_detach")?.0,
                memcpy: function("memcpy")?,
                arena_budget: self
                    .input
                    .memory_room
                    .map_or(ARENA_BUDGET, |room| ARENA_BUDGET.min(room / 2)),
                graft,
            }
            .write(&mut area, worker);
        }
        let bias = caller.function().bias;
        for ((site, _), at) in self.sites.iter().zip(&sites) {
            let by_pointer = self.cached(site).map_or(0, |name| name.wrapping_add(bias));
            layout::site(&mut area, *at, by_pointer, graft, worker);
        }
        Ok(Data {
            area,
            graft,
            worker,
            sites,
            bridge,
            control,
        })
    }

    /// The image address of the callee's name, where the bytes cannot change.
    fn cached(&self, site: &Site) -> Option<u64> {
        let library = &self.input.caller.function().image;
        site.names
            .iter()
            .find(|n| n.text == self.input.name && library.read_only(n.at.0))
            .map(|n| n.at.0)
    }

    fn stubs(&self, places: &Places, data: &Data) -> Result<(Vec<u8>, Vec<WindowRecord>), Refused> {
        let library = self.input.caller.function();
        let bias = library.bias;
        let mut bytes = getenv_thunk(data.graft, data.bridge.getenv);
        bytes.resize(THUNK as usize, 0xcc);
        let mut records = Vec::new();
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
                Tail::Hook {
                    flag: data.worker + offset_of!(abi::Worker, dirty) as u64,
                    hook: data.bridge.hook,
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
            records.push(WindowRecord {
                address: window.start.0.wrapping_add(bias),
                before: window.before.clone(),
                after: window.after(bias, at).map_err(|e| failed(e.to_string()))?,
                entry,
                routine: false,
                dynamic: false,
                call: window.kind == WindowKind::Call,
                site,
                copies: stub
                    .boundaries
                    .iter()
                    .map(|(from, to)| (*from, at + u64::from(*to)))
                    .collect(),
                names,
                cached: of
                    .and_then(|site| self.cached(site))
                    .map(|_| self.input.name.to_owned()),
            });
            bytes.extend(stub.bytes);
        }
        Ok((bytes, records))
    }

    fn finish(
        &self,
        places: &Places,
        sites: &Sites,
        build_id: String,
    ) -> Result<PatchPlan, Refused> {
        let input = self.input;
        let callee = input.callee.function();
        let loaded = self.loaded(places)?;
        let data = self.data(places, &loaded)?;
        let (stubs, new_windows) = self.stubs(places, &data)?;

        let mut parts = vec![part("stubs", places.stubs, Access::ReadExecute, stubs)];
        if input.present.is_none() {
            let given = Given {
                getenv: 0,
                environ: 0,
            };
            let bridge = load::relocate("the bridge", input.bridge, places.bridge, None, given)?;
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
            parts.push(part(&callee.path, region, access, segment.bytes.clone()));
        }
        let data_len = (data.area.bytes.len() as u64).next_multiple_of(PAGE);
        let region = Region {
            start: places.data,
            len: data_len,
        };
        parts.push(part("records", region, Access::ReadWrite, data.area.bytes));

        let mut manifest = match input.present {
            Some(present) => present.manifest.clone(),
            None => Manifest {
                version: abi::BRIDGE_VERSION,
                pid: input.caller.pid,
                start_time: input.caller.start_time,
                library: input.caller.function().path.clone(),
                control: data.control,
                worker: data.worker,
                bridge: data.bridge,
                regions: Vec::new(),
                windows: Vec::new(),
                grafts: Vec::new(),
            },
        };
        let record = GraftRecord {
            callee: input.name.into(),
            build_id: build_id.clone(),
            library: callee.path.clone(),
            graft: data.graft,
            index: self.index,
            slot: self.slot(),
            image: places.image,
            replaced: false,
        };
        let gate = manifest.gate(&record);
        let mut windows: Vec<WindowRecord> = manifest
            .windows
            .iter()
            .enumerate()
            .filter(|(i, w)| {
                let ours = w.serves_all() || w.passed_by(input.name);
                ours && !input.present.is_some_and(|p| p.in_place(*i))
            })
            .map(|(_, w)| w.clone())
            .collect();
        windows.extend(new_windows.iter().cloned());
        manifest.regions.push(places.reservation);
        manifest.windows.extend(new_windows);
        for old in manifest
            .grafts
            .iter_mut()
            .filter(|g| g.callee == input.name)
        {
            old.replaced = true;
        }
        manifest.grafts.push(record.clone());
        let stores = if input.present.is_some() {
            stores(&manifest, &record)
        } else {
            Vec::new()
        };

        let plan = PatchPlan {
            build_id,
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
                loaded.relocations - loaded.ifuncs.len(),
                loaded.ifuncs.len(),
            ),
            initialisers: loaded.inits.len(),
            stores,
            windows: in_order(windows),
            unfused: sites.unfused.clone(),
            gate,
            slot: other_slot(input.present),
            ..base(input, manifest)
        };
        plan.manifest.encode()?;
        match input.memory_room {
            Some(room) if plan.resident_bytes() > room => Err(Refused::MemoryLimit {
                bytes: plan.resident_bytes(),
                room,
            }),
            _ => Ok(plan),
        }
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

/// `movabs rsi, graft; movabs rax, ng_getenv; jmp rax`
fn getenv_thunk(graft: u64, getenv: u64) -> Vec<u8> {
    let mut bytes = vec![0x48, 0xbe];
    bytes.extend(graft.to_le_bytes());
    bytes.extend([0x48, 0xb8]);
    bytes.extend(getenv.to_le_bytes());
    bytes.extend([0xff, 0xe0]);
    bytes
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
