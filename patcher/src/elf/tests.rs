//! Files that no linker makes: what they may cost, and that they are refused.

use super::constants as c;
use super::*;

/// Where the dynamic section lies in a [`file`].
const DYNAMIC: u64 = 0x200;
/// Where the payload lies in a [`file`].
const PAYLOAD: u64 = 0x1000;

fn put(file: &mut Vec<u8>, at: u64, bytes: &[u8]) {
    let end = at as usize + bytes.len();
    file.resize(file.len().max(end), 0);
    file[at as usize..end].copy_from_slice(bytes);
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// `p_type`, `p_flags`, then `p_offset`, `p_vaddr`, `p_paddr`, `p_filesz`,
/// `p_memsz`, `p_align`.
fn program(kind: u32, flags: u32, fields: [u64; 6]) -> Vec<u8> {
    let head = [kind.to_le_bytes(), flags.to_le_bytes()].concat();
    [head, words(&fields)].concat()
}

fn headers(programs: &[Vec<u8>]) -> Vec<u8> {
    let mut file = vec![0; 64];
    file[..8].copy_from_slice(b"\x7fELF\x02\x01\x01\0");
    file[16..20].copy_from_slice(&[3, 0, 62, 0]);
    file[32] = 64;
    file[54] = 56;
    file[56..58].copy_from_slice(&(programs.len() as u16).to_le_bytes());
    file.extend(programs.concat());
    file
}

/// A shared object of one segment, its addresses the file's offsets.
fn file(dynamic: &[(i64, u64)], payload: &[u8]) -> Arc<[u8]> {
    let table: Vec<u64> = dynamic.iter().flat_map(|(t, v)| [*t as u64, *v]).collect();
    let (table, len) = (words(&table), PAYLOAD + payload.len() as u64);
    let load = program(c::PT_LOAD, 6, [0, 0, 0, len, len, 0x1000]);
    let size = table.len() as u64;
    let mut file = headers(&[
        load,
        program(c::PT_DYNAMIC, 6, [DYNAMIC, DYNAMIC, 0, size, size, 8]),
    ]);
    put(&mut file, DYNAMIC, &table);
    put(&mut file, PAYLOAD, payload);
    file.into()
}

fn segments(loads: &[[u64; 6]]) -> Arc<[u8]> {
    let programs: Vec<_> = loads.iter().map(|l| program(c::PT_LOAD, 6, *l)).collect();
    let mut file = headers(&programs);
    file.resize(0x4000, 0);
    file.into()
}

fn refusal(file: Arc<[u8]>) -> String {
    Image::parse(file).unwrap_err().to_string()
}

#[test]
fn a_segment_of_zeros_alone_needs_nothing_of_the_file() {
    let last = [u64::MAX, 0x10_0000, 0, 0, 0x5000, 0x1000];
    let image = Image::parse(segments(&[[0, 0, 0, 0x1000, 0x1000, 0x1000], last])).unwrap();
    assert_eq!((image.low(), image.high()), (0, 0x10_5000));
}

#[test]
fn a_segment_lies_in_user_space() {
    for start in [!0xfff, (1 << 47) - 0x1000, 1 << 63] {
        let text = refusal(segments(&[[0, start, 0, 0x1000, 0x2000, 0x1000]]));
        assert!(text.contains("PT_LOAD"), "{text}");
    }
    let text = refusal(segments(&[[0, 0, 0, 0x1000, u64::MAX, 0x1000]]));
    assert!(text.contains("PT_LOAD"), "{text}");
}

#[test]
fn segments_are_few_and_aligned_to_powers_of_two() {
    let page = |i: u64| [0, i * 0x1000, 0, 0x1000, 0x1000, 0x1000];
    let many: Vec<_> = (0..200).map(page).collect();
    assert!(refusal(segments(&many)).contains("number of PT_LOAD"));
    assert!(refusal(segments(&[[0, 0, 0, 1, 1, 0x1001]])).contains("alignment"));
    let image = Image::parse(segments(&[[0, 0, 0, 1, 1, 0x20_0000]])).unwrap();
    assert_eq!(image.alignment(), 0x20_0000);
    let image = Image::parse(segments(&[[0, 0, 0, 1, 1, 0]])).unwrap();
    assert_eq!(image.alignment(), 0x1000);
}

#[test]
fn notes_that_are_told_of_again_and_again_are_walked_once() {
    // Each of the headers names the same notes, none of which is a build-id.
    let notes = program(c::PT_NOTE, 4, [0x1000, 0x1000, 0, 0x1000, 0x1000, 4]);
    let mut programs = vec![program(c::PT_LOAD, 6, [0, 0, 0, 0x2000, 0x2000, 0x1000])];
    programs.resize(60, notes);
    let mut file = headers(&programs);
    file.resize(0x2000, 0);
    assert!(refusal(file.into()).contains("number of notes"));
}

/// A table of `count` symbols, all of the name at `name(index)`.
fn symbols(count: u64, name: impl Fn(u64) -> u32, strings: &[u8]) -> Arc<[u8]> {
    // The hash table has only what is read of it: the number of symbols.
    let mut payload = [[1_u32.to_le_bytes(), (count as u32).to_le_bytes()].concat()].concat();
    for index in 0..count {
        payload.extend(name(index).to_le_bytes());
        payload.extend([0x12, 0, 5, 0]);
        payload.extend(words(&[0x1000, 1]));
    }
    let at = PAYLOAD + payload.len() as u64;
    payload.extend(strings);
    let dynamic = [
        (c::DT_HASH, PAYLOAD),
        (c::DT_SYMTAB, PAYLOAD + 8),
        (c::DT_STRTAB, at),
    ];
    file(&dynamic, &payload)
}

#[test]
fn names_that_overlap_do_not_multiply() {
    let strings = [vec![b'a'; 50_000], vec![0]].concat();
    let text = refusal(symbols(10_000, |_| 0, &strings));
    assert!(text.contains("length of all"), "{text}");
    let text = refusal(symbols(10_000, |index| index as u32, &strings));
    assert!(text.contains("length of all"), "{text}");
    let text = refusal(symbols(10_000, |_| 49_999, &strings));
    assert!(text.contains("symbols of one name"), "{text}");
}

#[test]
fn a_name_may_be_as_long_as_those_of_templates_are() {
    let strings = [vec![b'a'; 100_000], vec![0]].concat();
    let image = Image::parse(symbols(3, |_| 0, &strings)).unwrap();
    assert_eq!(image.symbols[2].name.len(), 100_000);
}

#[test]
fn versions_that_lead_to_each_other_are_walked_once() {
    // Every entry has all the names there are behind it, and the next entry
    // lies within those.
    let mut payload = vec![0; 0x4_0000];
    for at in (0..0x3_fff0).step_by(16) {
        let entry = [1_u16.to_le_bytes(), 0xffff_u16.to_le_bytes()].concat();
        payload[at..at + 4].copy_from_slice(&entry);
        payload[at + 8..at + 12].copy_from_slice(&16_u32.to_le_bytes());
        payload[at + 12..at + 16].copy_from_slice(&16_u32.to_le_bytes());
    }
    let table = |of, count| {
        file(
            &[
                (c::DT_SYMTAB, PAYLOAD),
                (c::DT_STRTAB, PAYLOAD + 4),
                (of, PAYLOAD),
                (count, u64::MAX),
            ],
            &payload,
        )
    };
    assert!(refusal(table(c::DT_VERNEED, c::DT_VERNEEDNUM)).contains("number of versions"));
    let mut definitions = vec![0; 0x8_0000];
    for at in (0..0x7_ffe0).step_by(4) {
        definitions[at..at + 4].copy_from_slice(&4_u32.to_le_bytes());
    }
    payload = definitions;
    let table = file(
        &[
            (c::DT_SYMTAB, PAYLOAD),
            (c::DT_STRTAB, PAYLOAD),
            (c::DT_VERDEF, PAYLOAD),
            (c::DT_VERDEFNUM, u64::MAX),
        ],
        &payload,
    );
    assert!(refusal(table).contains("number of versions"));
}

#[test]
fn relative_relocations_are_no_more_than_words() {
    // Every bitmap of all ones stands for 63 words; the file has far fewer.
    let payload = words(&[&[PAYLOAD][..], &[u64::MAX; 999]].concat());
    let dynamic = [(c::DT_RELR, PAYLOAD), (c::DT_RELRSZ, 8000)];
    assert!(refusal(file(&dynamic, &payload)).contains("number of relocations"));
    let dynamic = [(c::DT_RELR, 0), (c::DT_RELRSZ, 0)];
    assert!(Image::parse(file(&dynamic, &payload)).is_ok());
}

#[test]
fn numbers_near_the_largest_do_not_overflow() {
    let tags = [
        c::DT_STRTAB,
        c::DT_SYMTAB,
        c::DT_HASH,
        c::DT_GNU_HASH,
        c::DT_VERSYM,
        c::DT_RELA,
        c::DT_RELASZ,
        c::DT_JMPREL,
        c::DT_PLTRELSZ,
        c::DT_RELR,
        c::DT_RELRSZ,
        c::DT_VERDEF,
        c::DT_VERDEFNUM,
        c::DT_VERNEED,
        c::DT_VERNEEDNUM,
        c::DT_INIT,
        c::DT_INIT_ARRAY,
        c::DT_INIT_ARRAYSZ,
        c::DT_SONAME,
        c::DT_NEEDED,
    ];
    let payload = words(&[u64::MAX; 64]);
    let values = [
        0,
        1,
        PAYLOAD,
        PAYLOAD + 505,
        PAYLOAD + 512,
        1 << 63,
        u64::MAX - 7,
        u64::MAX,
    ];
    for base in values {
        for (index, _) in tags.iter().enumerate() {
            for value in values {
                let mut dynamic: Vec<_> = tags.iter().map(|tag| (*tag, base)).collect();
                dynamic[index].1 = value;
                // Whatever it says, it says it.
                let _ = Image::parse(file(&dynamic, &payload));
                let _ = Image::parse(file(&dynamic[..=index], &payload));
            }
        }
    }
}
