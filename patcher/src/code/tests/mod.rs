//! Windows and stubs from pasted bytes, decoded back; broken files.

mod elf;
mod hostile;
mod routine;
mod stubs;
mod windows;

pub(crate) use elf::library;
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// Intel disassembly, one instruction per element.
fn disassemble(bytes: &[u8], ip: u64) -> Vec<String> {
    let mut formatter = IntelFormatter::new();
    formatter
        .options_mut()
        .set_space_after_operand_separator(true);
    Decoder::with_ip(64, bytes, ip, DecoderOptions::NONE)
        .into_iter()
        .map(|i| {
            let mut text = String::new();
            formatter.format(&i, &mut text);
            text
        })
        .collect()
}
