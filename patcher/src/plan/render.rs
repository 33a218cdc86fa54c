//! A plan for people: what is mapped where, and each window's code before and
//! after.

use std::fmt::{self, Write as _};

use iced_x86::{Decoder, DecoderOptions, Formatter as _, IntelFormatter};

use super::{Access, PatchPlan};
use crate::effects;
use crate::elf::hex;
use crate::manifest::WindowRecord;

impl PatchPlan {
    /// The plan as text, ending with a newline.
    #[must_use]
    pub fn render(&self) -> String {
        let mut out = String::new();
        // Writing to a String cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> fmt::Result {
        writeln!(
            out,
            "worker {} ({}) ← {} ({})",
            self.pid, self.caller_library, self.callee, self.callee_library
        )?;
        if self.already {
            writeln!(out, "  already fused: nothing to do")?;
            return self.write_effects(out);
        }
        for island in &self.islands {
            writeln!(
                out,
                "\nmap {} at {:#x}: {}",
                size(island.reservation.len),
                island.reservation.start,
                island.parts.first().map_or("", |p| p.what.as_str())
            )?;
        }
        match &self.mapping {
            Some(mapping) => {
                writeln!(
                    out,
                    "\nmap {} at {:#x}, image {}",
                    size(mapping.reservation.len),
                    mapping.reservation.start,
                    self.build_id
                )?;
                for part in &mapping.parts {
                    let access = match part.access {
                        Access::Read => "r--",
                        Access::ReadWrite => "rw-",
                        Access::ReadExecute => "r-x",
                    };
                    writeln!(
                        out,
                        "  {:#x}-{:#x} {access} {}",
                        part.start,
                        part.start + part.len,
                        part.what
                    )?;
                }
                if let Some(control) = mapping.control {
                    writeln!(
                        out,
                        "  {:#x}-{:#x} rw-s gates, counters, record",
                        control.start,
                        control.start + control.len
                    )?;
                }
                writeln!(
                    out,
                    "  {} relocations applied from outside, {} left to the bridge; {} initialisers on the bridge's thread",
                    self.relocations.0, self.relocations.1, self.initialisers
                )?;
            }
            None => writeln!(
                out,
                "\nimage {} is there already: used again",
                self.build_id
            )?,
        }
        for store in &self.stores {
            writeln!(
                out,
                "  store {} at {:#x}: {}",
                hex(&store.bytes),
                store.address,
                store.what
            )?;
        }
        for window in &self.windows {
            self.write_window(out, window)?;
        }
        for site in &self.unfused {
            writeln!(
                out,
                "\nleft as RPC: the call at {}: {}",
                self.place(site.at),
                site.reason
            )?;
        }
        if self.has_routine() {
            let windows = self.manifest.windows.iter();
            let sites = windows.filter(|w| w.is_site() && w.passed_by(&self.callee));
            writeln!(
                out,
                "\n{} sites of {} rewritten in place; calls from elsewhere go through the entry of the worker's own invoke_func ({} known)",
                sites.count(),
                self.callee,
                self.through_routine.len()
            )?;
        }
        for call in &self.through_routine {
            writeln!(
                out,
                "\nthrough the worker's own invoke_func: the call at {:#x}: {}",
                call.at, call.reason
            )?;
        }
        self.write_effects(out)
    }

    fn write_effects(&self, out: &mut String) -> fmt::Result {
        out.push('\n');
        out.push_str(&effects::report(&self.callee, &self.effects));
        writeln!(
            out,
            "always shared: process, memory limit, log files; no time limit on the call; its own environment"
        )
    }

    fn place(&self, address: u64) -> String {
        let file = self.caller_library.rsplit('/').next().unwrap_or_default();
        format!(
            "{address:#x} ({file}+{:#x})",
            address.wrapping_sub(self.caller_bias)
        )
    }

    fn write_window(&self, out: &mut String, window: &WindowRecord) -> fmt::Result {
        let what = match window {
            w if w.entry => "entry of faas_func_call",
            w if w.routine => "entry of the worker's own invoke_func, for all names",
            w if w.dynamic => "call seen at run time, for all names",
            w if w.is_call() => "call",
            _ => "tail jump",
        };
        let what = match window.hop_of {
            0 => what.to_owned(),
            from => format!("filler on the way from the call at {from:#x}"),
        };
        // The others lie in other files.
        let place = if window.routine || window.dynamic {
            format!("{:#x}", window.address)
        } else {
            self.place(window.address)
        };
        writeln!(out, "\nwindow {place}, {what}")?;
        for line in disassemble(&window.before, window.address) {
            writeln!(out, "  - {line}")?;
        }
        for line in disassemble(&window.after, window.address) {
            writeln!(out, "  + {line}")?;
        }
        let Some((at, code)) = self.stub_of(window) else {
            return Ok(());
        };
        writeln!(out, "  stub {at:#x}")?;
        for line in disassemble(code, at) {
            writeln!(out, "      {line}")?;
        }
        Ok(())
    }

    /// The stub's code up to the jump into the bridge.
    fn stub_of(&self, window: &WindowRecord) -> Option<(u64, &[u8])> {
        let at = window.copies.iter().map(|(_, to)| *to).min()?;
        let part = self
            .mappings()
            .flat_map(|m| &m.parts)
            .find(|p| (p.start..p.start + p.len).contains(&at))?;
        let code = part.bytes.get((at - part.start) as usize..)?;
        // `jmp [rip]` ends a bridge stub, `jmp rel32` an entry's fast path.
        let end = code
            .windows(6)
            .position(|w| w == [0xff, 0x25, 0, 0, 0, 0])
            .map(|at| at + 6)?;
        (!window.entry && end < 512).then(|| (at, &code[..end]))
    }
}

fn disassemble(code: &[u8], at: u64) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    let options = formatter.options_mut();
    options.set_hex_prefix("0x");
    options.set_hex_suffix("");
    options.set_space_after_operand_separator(true);
    let mut lines = Vec::new();
    let decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    for instruction in decoder {
        let start = (instruction.ip() - at) as usize;
        let bytes = code
            .get(start..start + instruction.len())
            .unwrap_or_default();
        let mut text = String::new();
        formatter.format(&instruction, &mut text);
        lines.push(format!("{:x}: {:<24} {text}", instruction.ip(), hex(bytes)));
    }
    lines
}

fn size(bytes: u64) -> String {
    if bytes < 1 << 20 {
        format!("{} KiB", bytes >> 10)
    } else {
        format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
    }
}
