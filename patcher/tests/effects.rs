//! The effects of libraries that a compiler made.

#![expect(
    clippy::unwrap_used,
    reason = "helpers of tests: to panic is their verdict"
)]

#[path = "loader/build.rs"]
#[expect(dead_code, reason = "what the loader's tests need")]
mod build;

use build::Library;
use nightgraft_patcher::effects::{self, Allowance, Effect};

/// The effects of a function library and of what it has copies of.
fn shown(libraries: &[(&str, &Library)], allowed: Allowance) -> Vec<Effect> {
    let images: Vec<_> = libraries.iter().map(|(_, l)| l.image()).collect();
    let all: Vec<effects::Library<'_>> = libraries
        .iter()
        .zip(&images)
        .map(|((path, _), image)| effects::Library { path, image })
        .collect();
    effects::effects(&all, |name| name != "nowhere" && name != "connect", allowed)
}

fn of(library: &Library) -> Vec<Effect> {
    shown(&[("/f/libbar.so", library)], Allowance::NONE)
}

fn kinds(library: &Library) -> Vec<String> {
    of(library).into_iter().map(|e| e.kind).collect()
}

fn cpp(source: &str) -> Library {
    Library::build("g++", "cc", source, &["-std=c++17"])
}

#[test]
fn file_streams_are_files_and_console_streams_are_none() {
    let console = cpp(
        "#include <iostream>\n#include <sstream>\n#include <filesystem>
         int f(const char *p) {
             std::ostringstream s; s << 3; std::cout << s.str() << std::filesystem::path(p).string().size();
             return 0;
         }",
    );
    assert_eq!(kinds(&console), Vec::<String>::new());
    for (body, import) in [
        (
            "std::ifstream s(p); int i = 0; s >> i; return i;",
            "basic_ifstream",
        ),
        (
            "std::ofstream s; s.open(p); return s.is_open();",
            "basic_ofstream",
        ),
        ("return std::filesystem::exists(p);", "filesystem"),
        (
            "for (auto &e : std::filesystem::directory_iterator(p)) return e.is_directory(); return 0;",
            "directory_iterator",
        ),
    ] {
        for optimised in ["-O0", "-O2"] {
            let source = format!(
                "#include <filesystem>\n#include <fstream>\nint f(const char *p) {{ {body} }}"
            );
            let library = Library::build("g++", "cc", &source, &["-std=c++17", optimised]);
            let effects = of(&library);
            assert_eq!(effects[0].kind, "files", "{body}");
            let imports = effects[0].seen[0].imports.join(" ");
            assert!(imports.contains(import), "{import} in {imports}");
        }
    }
}

#[test]
fn weak_imports_that_mean_nothing_do_not_count() {
    let weak = Library::new(
        "extern int connect(int) __attribute__((weak)); extern int access(const char *, int) __attribute__((weak));
         int f(void) { return (connect ? connect(1) : 0) + (access ? access(\"\", 0) : 0); }",
        &[],
    );
    assert_eq!(kinds(&weak), ["files"]);
    let strong = Library::new(
        "extern int connect(int); int f(void) { return connect(1); }",
        &[],
    );
    assert_eq!(kinds(&strong), ["network"]);
}

#[test]
fn each_import_stands_under_its_library() {
    let function = Library::new(
        "#include <stdio.h>\nint f(void) { return fopen(\"/etc/bar.conf\", \"r\") != 0; }",
        &[],
    );
    let dependency = Library::new(
        "#include <sys/socket.h>\n#include <unistd.h>\n
         int g(void) { return socket(1, 2, 3) + access(\"x\", 0); }",
        &[],
    );
    let found = shown(
        &[
            ("/f/libbar.so", &function),
            ("/usr/lib/libdep.so.1", &dependency),
        ],
        Allowance::of(["network"]).unwrap(),
    );
    let seen: Vec<(&str, &str, bool, &str)> = found
        .iter()
        .flat_map(|e| {
            e.seen.iter().map(|s| {
                (
                    e.kind.as_str(),
                    s.library.as_str(),
                    e.allowed,
                    s.imports[0].as_str(),
                )
            })
        })
        .collect();
    assert_eq!(
        seen,
        [
            ("files", "/f/libbar.so", false, "fopen"),
            ("files", "/usr/lib/libdep.so.1", false, "access"),
            ("network", "/usr/lib/libdep.so.1", true, "socket"),
        ]
    );
    let refused = effects::refusal("/f/libbar.so", &found).unwrap();
    assert_eq!(refused.code(), "effects");
    assert_eq!(
        refused.to_string(),
        "fused, /f/libbar.so would use the caller's, which nobody allowed: \
         files (libbar.so: fopen, libdep.so.1: access)"
    );
    // What was allowed must be said again.
    let lift = refused.lift();
    assert!(lift.contains("--allow-effects files,network,"), "{lift}");
    let all = shown(&[("/f/libbar.so", &function)], Allowance::all());
    assert_eq!(effects::refusal("/f/libbar.so", &all), None);
}

#[test]
fn constants_are_evidence_for_what_imports_show_and_nothing_on_their_own() {
    let constants = "const char *all[] = {\"/etc/bar.conf\", \"http://me:secret@db.local/x\", \"db.local:5432\",
        \"Europe/Berlin\", \"conf/bar.json\", \"/etc/bar.conf\", \"no path\"};
        char writable[] = \"/etc/written\";";
    let silent = Library::new(constants, &[]);
    assert_eq!(of(&silent), []);
    let loud = Library::new(
        &format!(
            "#include <fcntl.h>\n#include <sys/socket.h>\n#include <time.h>\n{constants}
             long f(time_t *t) {{ return open(all[0], 0) + socket(1, 2, 3) + (long)localtime(t); }}"
        ),
        &[],
    );
    let effects = of(&loud);
    let strings = |kind: &str| {
        let effect = effects.iter().find(|e| e.kind == kind).unwrap();
        effect.seen[0].strings.clone()
    };
    assert_eq!(strings("files"), ["/etc/bar.conf", "conf/bar.json"]);
    assert_eq!(
        strings("network"),
        ["http://...@db.local/x", "db.local:5432"]
    );
    assert_eq!(strings("time-zone"), ["Europe/Berlin"]);
    let text = effects::report("Bar", &effects);
    assert!(
        text.contains("its constants: \"/etc/bar.conf\", \"conf/bar.json\"\n"),
        "{text}"
    );
    assert!(text.contains("--allow-effects files,network,"), "{text}");
    assert!(
        !text.contains("secret") && !text.contains("/etc/written"),
        "{text}"
    );
}

#[test]
fn evidence_is_bounded() {
    let many: Vec<String> = (0..30)
        .map(|i| format!("\"/etc/number{i}.conf\""))
        .collect();
    let long = format!("\"/etc/{}\"", "x".repeat(500));
    let library = Library::new(
        &format!(
            "#include <fcntl.h>\nconst char *all[] = {{{}, {long}}};\nint f(int i) {{ return open(all[i], 0); }}",
            many.join(", ")
        ),
        &[],
    );
    let effects = of(&library);
    let seen = &effects[0].seen[0];
    assert_eq!((seen.strings.len(), seen.more_strings), (8, 22));
}

#[test]
fn who_one_is_counts_as_credentials() {
    let library = Library::new(
        "#include <unistd.h>\nint f(void) { return geteuid(); }",
        &[],
    );
    assert_eq!(kinds(&library), ["credentials"]);
    assert!(of(&library)[0].guarded);
    let library = Library::new(
        "#include <unistd.h>\n#include <sys/socket.h>\n
         int f(int *p) { return pipe(p) + socketpair(1, 1, 0, p) + send(*p, p, 4, 0); }",
        &[],
    );
    assert_eq!(kinds(&library), Vec::<String>::new());
}
