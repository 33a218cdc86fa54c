//! Whether an edge's calls can be guarded, and what that changes.
//!
//! The bridge decides at each crash whether the call can be left
//! (`nightgraft_bridge::guard`). What is known before is refused here: a callee
//! that changes how its thread gets signals would leave it so, and without an
//! unwinder that knows the callee's frames no crash could ever be left.

use std::mem::offset_of;

use nightgraft_bridge::abi;

use super::Store;
use crate::load;
use crate::manifest::{GraftRecord, Manifest};
use crate::refused::Refused;
use crate::snapshot::{Module, Worker};

/// The bridge's routine that guarded calls go through.
pub(crate) const ROUTINE: &str = "ng_guarded";

/// Functions that set a signal's action: whose is in force then is not known.
const ACTIONS: &[&str] = &[
    "sigaction",
    "__sigaction",
    "signal",
    "bsd_signal",
    "sysv_signal",
    "__sysv_signal",
    "ssignal",
    "sigset",
    "sigignore",
    "sigvec",
    "siginterrupt",
];
/// Functions that change which signals are blocked: a crash behind one of them
/// would leave the caller so.
const MASKS: &[&str] = &[
    "sigprocmask",
    "pthread_sigmask",
    "sigblock",
    "sigsetmask",
    "sighold",
    "sigrelse",
];
/// What the bridge needs of the worker's unwinder.
const UNWINDER: &[&str] = &["_Unwind_Backtrace", "_Unwind_GetCFA", "_Unwind_GetIP"];

/// Refuses what cannot be guarded.
pub(super) fn check(caller: &Worker, callee: &Worker) -> Result<(), Refused> {
    let refused = |library: &Module, reason: String| Refused::NoGuard {
        library: library.path.clone(),
        reason,
    };
    let unwinder = caller
        .modules
        .iter()
        .find(|m| m.short_name() == "libgcc_s.so.1")
        .filter(|m| {
            let has = |name: &&str| load::exported_by(m, name).is_some();
            UNWINDER.iter().all(has)
        });
    if unwinder.is_none() {
        let why = "without libgcc_s in the caller's worker it cannot be told what a crash would leave behind";
        return Err(refused(callee.function(), why.to_owned()));
    }
    if callee.function().image.eh_frame().is_none() {
        let why = "it has no unwind tables (.eh_frame), so that it cannot be told what a crash would leave behind";
        return Err(refused(callee.function(), why.to_owned()));
    }
    for library in [callee.function()]
        .into_iter()
        .chain(load::private_libraries(callee)?)
    {
        let imports = |names: &[&str]| {
            let symbols = library.image.symbols.iter();
            let mut found = symbols.filter(|s| s.undefined() && names.contains(&s.name.as_str()));
            found.next().map(|s| s.name.clone())
        };
        if let Some(name) = imports(ACTIONS) {
            let why = format!("it imports {name}: it may set the actions of the signals itself");
            return Err(refused(library, why));
        }
        if let Some(name) = imports(MASKS) {
            let why = format!(
                "it imports {name}: a crash would leave signals blocked in the caller's thread"
            );
            return Err(refused(library, why));
        }
    }
    Ok(())
}

/// What a call of a graft calls.
fn target(manifest: &Manifest, graft: &GraftRecord, guarded: bool) -> Result<u64, Refused> {
    if !guarded {
        return Ok(graft.call);
    }
    let routine = manifest.bridge.exports.get(ROUTINE).copied();
    routine.ok_or_else(|| Refused::OtherBridge {
        found: format!("a bridge without {ROUTINE}"),
    })
}

/// The word that guards a graft's calls, or not.
pub(super) fn store(
    manifest: &Manifest,
    graft: &GraftRecord,
    guarded: bool,
) -> Result<Store, Refused> {
    let how = if guarded { "guarded" } else { "direct" };
    Ok(Store {
        address: graft.graft + offset_of!(abi::Graft, call) as u64,
        bytes: target(manifest, graft, guarded)?.to_le_bytes().into(),
        what: format!("calls of {}: {how}", graft.callee),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// This process, with libgcc_s as the function's library: its path as ld.so
    /// found it, where `/lib` may be a link to `/usr/lib`.
    fn myself() -> Worker {
        let pid = std::process::id().cast_signed();
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mut paths = maps.lines().filter_map(|l| l.split_whitespace().last());
        let mapped = paths.find(|path| path.ends_with("/libgcc_s.so.1"));
        let mapped = mapped.expect("a Rust program has its unwinder there");
        let loaded = mapped.strip_prefix("/usr").unwrap_or(mapped);
        Worker::read(pid, loaded.as_ref())
            .or_else(|_| Worker::read(pid, mapped.as_ref()))
            .unwrap()
    }

    #[test]
    fn nothing_is_guarded_in_a_worker_without_an_unwinder() {
        let callee = myself();
        assert_eq!(check(&callee, &callee), Ok(()));
        let mut caller = myself();
        let short = |m: &Module| m.short_name().to_owned();
        caller.modules.retain(|m| short(m) != "libgcc_s.so.1");
        let refused = check(&caller, &callee).unwrap_err();
        assert_eq!(refused.code(), "no-guard");
        assert!(
            refused.to_string().contains("without libgcc_s"),
            "{refused}"
        );
    }
}
