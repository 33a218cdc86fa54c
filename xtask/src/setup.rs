//! What a fresh Debian machine lacks.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// Package, and the file that shows that it (or something equal) is there.
type Needed = (&'static str, &'static str);

/// For building functions in C and C++, and for asking them as users do.
const BUILD: &[Needed] = &[
    ("gcc", "/usr/bin/gcc"),
    ("g++", "/usr/bin/g++"),
    ("libc6-dev", "/usr/include/stdio.h"),
    ("clang", "/usr/bin/clang"),
    ("curl", "/usr/bin/curl"),
];
/// For tests and the demo with Docker.
const DOCKER: &[Needed] = &[("docker.io", "/usr/sbin/dockerd")];

/// For the fixtures of `coverage`: other linkers, tools that rewrite libraries,
/// and the libraries that functions use.
const FIXTURES: &[Needed] = &[
    ("binutils", "/usr/bin/ld.gold"),
    ("lld", "/usr/bin/ld.lld"),
    ("llvm", "/usr/bin/llvm-profdata"),
    (
        "libclang-rt-14-dev",
        "/usr/lib/llvm-14/lib/clang/14.0.6/lib/linux/libclang_rt.profile-x86_64.a",
    ),
    ("bolt-16", "/usr/bin/llvm-bolt-16"),
    ("patchelf", "/usr/bin/patchelf"),
    ("musl-tools", "/usr/bin/musl-gcc"),
    ("libc6-amd64-cross", "/usr/x86_64-linux-gnu/lib/libc.so.6"),
    ("libssl-dev", "/usr/include/openssl/evp.h"),
    ("zlib1g-dev", "/usr/include/zlib.h"),
    ("libsqlite3-dev", "/usr/include/sqlite3.h"),
    ("libpcre2-dev", "/usr/include/pcre2.h"),
    ("libjpeg62-turbo-dev", "/usr/include/jpeglib.h"),
    ("libxml2-dev", "/usr/include/libxml2/libxml/parser.h"),
    ("libthrift-dev", "/usr/include/thrift/Thrift.h"),
    ("locales", "/usr/share/i18n/locales/de_DE"),
];

/// Which tasks are to run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Extent {
    /// Those that compile functions.
    Functions,
    /// These, in Docker's containers.
    Docker,
    /// `coverage`.
    Fixtures,
    /// Everything.
    All,
}

/// Installs what is missing, and says what.
pub(crate) fn install(extent: Extent) -> Result<()> {
    let parts: &[&[Needed]] = match extent {
        Extent::Functions => &[BUILD],
        Extent::Docker => &[BUILD, DOCKER],
        Extent::Fixtures => &[BUILD, FIXTURES],
        Extent::All => &[BUILD, DOCKER, FIXTURES],
    };
    let missing: Vec<&str> = parts
        .iter()
        .copied()
        .flatten()
        .filter(|(_, file)| !std::path::Path::new(file).exists())
        .map(|(package, _)| *package)
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    let by_hand = format!("install them by hand: apt-get install --no-install-recommends {list}");
    ensure!(
        std::path::Path::new("/usr/bin/apt-get").exists(),
        "missing: {list}, and there is no apt-get; {by_hand}"
    );
    eprintln!("installing Debian packages that are missing: {list}");
    apt(&["update"])
        .context("apt-get update")
        .with_context(|| by_hand.clone())?;
    let arguments = ["install", "--yes", "--no-install-recommends"];
    apt(&arguments.into_iter().chain(missing).collect::<Vec<_>>()).with_context(|| by_hand)
}

fn apt(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null())
        .output()
        .context("apt-get cannot be started")?;
    if !output.status.success() {
        bail!(
            "apt-get failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
