//! What can be told from the names of a library's imports alone.

use super::interpose;
use crate::elf::Image;
use crate::refused::Refused;

/// Imports that would take the process for the callee's own, and why that
/// cannot be had; those that are interposed are not among them.
const UNSUPPORTED: &[(&[&str], &str)] = &[
    (
        &[
            "dlopen", "dlmopen", "dlsym", "dlvsym", "dlclose", "dlinfo", "dlerror",
        ],
        "asks the dynamic linker, which does not know the image",
    ),
    (
        &["dladdr", "dladdr1", "dl_iterate_phdr"],
        "asks the dynamic linker, which does not know the image",
    ),
    (
        &["_dl_find_object"],
        "shows an unwinder of its own (libgcc linked statically), which would not know the frames around it",
    ),
    (
        &["initstate", "setstate"],
        "would change the table of the caller's random numbers",
    ),
    (
        &["__tls_get_addr_slow", "___tls_get_addr"],
        "needs thread-local storage of the dynamic linker's own",
    ),
];

/// Imports of code that throws, catches or has something to clean up when an
/// exception passes.
const EXCEPTIONS: &[&str] = &[
    "__gxx_personality_v0",
    "__gcc_personality_v0",
    "__gnat_personality_v0",
    "__gdc_personality_v0",
    "__gccgo_personality_v0",
    "__objc_personality_v0",
    "__cxa_allocate_exception",
    "__cxa_throw",
    "__cxa_rethrow",
    "__cxa_begin_catch",
    "__cxa_bad_cast",
    "__cxa_bad_typeid",
    "__cxa_throw_bad_array_new_length",
    "__cxa_throw_bad_array_length",
];

/// Whether an import has to do with exceptions. The image's unwind tables are
/// not registered in the worker, so one that reaches its frames ends the
/// process, also where the callee has a handler for it.
fn exceptional(name: &str) -> bool {
    EXCEPTIONS.contains(&name)
        || name.starts_with("_Unwind_")
        || name.starts_with("_ZSt17rethrow_exception")
        // std::__throw_length_error(char const*) and the like.
        || name.starts_with("_ZSt") && name.contains("__throw_")
}

/// Checks what can be told from the imports' names alone, weak ones and those
/// that no relocation uses among them.
pub(super) fn check(library: &str, image: &Image, unwinder: bool) -> Result<(), Refused> {
    let unwound = unwinder && image.eh_frame().is_some();
    for symbol in image.symbols.iter().filter(|s| s.undefined()) {
        let name = symbol.name.as_str();
        if interpose::interposed(name).is_some() {
            continue;
        }
        if exceptional(name) && !unwound {
            return Err(Refused::Exceptions {
                library: library.to_owned(),
                symbol: name.to_owned(),
            });
        }
        for (names, reason) in UNSUPPORTED {
            if names.contains(&name) {
                return Err(Refused::UnsupportedImport {
                    library: library.to_owned(),
                    symbol: name.to_owned(),
                    reason: (*reason).into(),
                });
            }
        }
    }
    Ok(())
}
