//! From fixtures to rows: who compiles each of them, and how.
//!
//! The reduced matrix has every fixture, by each of its compilers with its
//! first flags, and everything else (more flags, linkers, tools, places of
//! dependencies) by its first compiler. The whole one crosses all of it with
//! all compilers, and adds the ABI matrix.

use std::fmt;

use super::directives::{Dependency, Linker, Tool};
use super::fixture::Fixture;
use crate::fixtures::Compiler;

/// The ABI matrix; `PROFILE` stands for a profile taken from the inputs.
const ABI: [&[&str]; 6] = [
    &["-O0"],
    &["-O1"],
    &["-O3"],
    &["-Os"],
    &["-Os", "-flto"],
    &["-O2", PROFILE],
];
/// Not a flag: compile, run, and compile again with what was seen.
pub(super) const PROFILE: &str = "PROFILE";

/// Who compiles a fixture, and how.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variant {
    /// `None` for Rust.
    pub compiler: Option<Compiler>,
    /// Its flags.
    pub flags: Vec<String>,
    /// The linker; `None` for the compiler's own choice.
    pub linker: Option<Linker>,
    /// What rewrites the library afterwards.
    pub tool: Option<Tool>,
    /// Where the libraries are that it links.
    pub dependency: Option<Dependency>,
}

impl Variant {
    /// Whether it is compiled with a profile.
    pub(super) fn profiled(&self) -> bool {
        self.flags.iter().any(|f| f == PROFILE)
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.compiler.map_or("rustc", Compiler::program))?;
        for flag in &self.flags {
            match flag.as_str() {
                PROFILE => f.write_str(" +profile")?,
                flag => write!(f, " {flag}")?,
            }
        }
        if let Some(linker) = self.linker {
            write!(f, ", ld.{}", linker.name())?;
        }
        if let Some(tool) = self.tool {
            write!(f, ", {}", tool.name())?;
        }
        if let Some(dependency) = self.dependency {
            write!(f, ", {}", dependency.name())?;
        }
        Ok(())
    }
}

/// The variants of one fixture.
pub fn variants(fixture: &Fixture, whole: bool) -> Vec<Variant> {
    let d = &fixture.directives;
    let rust = [&fixture.callee, &fixture.caller]
        .iter()
        .any(|source| source.extension().is_some_and(|e| e == "rs"));
    let compilers: Vec<Option<Compiler>> = if rust {
        vec![None]
    } else {
        d.compilers.iter().copied().map(Some).collect()
    };
    let mut all: Vec<Variant> = Vec::new();
    let mut add = |variant: Variant| {
        if !all.contains(&variant) {
            all.push(variant);
        }
    };
    for (nth, compiler) in compilers.iter().enumerate() {
        let every = whole || nth == 0;
        let base = Variant {
            compiler: *compiler,
            flags: if rust && d.flags == [["-O2"]] {
                vec!["-O".to_owned()]
            } else {
                d.flags[0].clone()
            },
            linker: None,
            tool: None,
            dependency: d.dependency.first().copied(),
        };
        add(base.clone());
        if !every {
            // The other extreme of the ABI matrix comes with the last compiler.
            if d.abi_matrix {
                add(with_flags(&base, ABI[0]));
            }
            continue;
        }
        for flags in &d.flags[1..] {
            add(Variant {
                flags: flags.clone(),
                ..base.clone()
            });
        }
        if d.abi_matrix && whole {
            for flags in ABI {
                add(with_flags(&base, flags));
            }
        }
        for linker in &d.linkers {
            add(Variant {
                linker: Some(*linker),
                ..base.clone()
            });
        }
        for tool in &d.tools {
            add(Variant {
                tool: Some(*tool),
                ..base.clone()
            });
        }
        for dependency in &d.dependency {
            add(Variant {
                dependency: Some(*dependency),
                ..base.clone()
            });
        }
    }
    all
}

fn with_flags(base: &Variant, flags: &[&str]) -> Variant {
    Variant {
        flags: flags.iter().map(|&f| f.to_owned()).collect(),
        ..base.clone()
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::coverage::directives::Directives;

    fn rows(more: &str, whole: bool) -> Vec<String> {
        let text = format!("//# about: x\n//# kind: k\n//# role: callee\n//# input: i\n{more}");
        let source = PathBuf::from("x/callee.c");
        let fixture = Fixture {
            name: "x".into(),
            dir: "x".into(),
            directives: Directives::parse(&source, &text).unwrap(),
            caller: "shared/caller.c".into(),
            callee: source,
        };
        variants(&fixture, whole)
            .iter()
            .map(Variant::to_string)
            .collect()
    }

    #[test]
    fn both_compilers_once() {
        assert_eq!(rows("", false), ["gcc -O2", "clang -O2"]);
        assert_eq!(rows("", true), ["gcc -O2", "clang -O2"]);
    }

    #[test]
    fn the_reduced_matrix_has_every_kind_once() {
        let more = "//# flags: -O2\n//# flags: -O3 -g\n//# linker: gold lld\n//# tools: bolt\n";
        assert_eq!(
            rows(more, false),
            [
                "gcc -O2",
                "gcc -O3 -g",
                "gcc -O2, ld.gold",
                "gcc -O2, ld.lld",
                "gcc -O2, bolt",
                "clang -O2"
            ]
        );
        assert_eq!(rows(more, true).len(), 10);
    }

    #[test]
    fn the_abi_matrix_is_whole_only_in_the_whole() {
        assert_eq!(
            rows("//# matrix: abi\n", false),
            ["gcc -O2", "clang -O2", "clang -O0"]
        );
        let whole = rows("//# matrix: abi\n", true);
        assert_eq!(whole.len(), 14);
        assert!(whole.contains(&"clang -O2 +profile".to_owned()));
    }

    #[test]
    fn dependencies_are_in_each_place() {
        assert_eq!(
            rows(
                "//# compilers: gcc\n//# dependency: in-callee-only in-caller-too\n",
                false
            ),
            ["gcc -O2, in-callee-only", "gcc -O2, in-caller-too"]
        );
    }
}
