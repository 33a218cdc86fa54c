//! The loader on libraries that a compiler made: what it refuses, and that
//! what it loads is what ld.so would have made of it.

#[path = "loader/build.rs"]
mod build;

use build::{ABI, ALONE, Library};
use nightgraft_patcher::Refused;
use nightgraft_patcher::load::{self, Given, Loaded};

const BASE: u64 = 0x7f12_3456_7000;
const GIVEN: Given = Given {
    getenv: 0x1111,
    environ: 0x2222,
};

fn check(library: &Library) -> Result<(), Refused> {
    load::check("/libbar.so", &library.image())
}

fn relocate(library: &Library) -> Result<Loaded, Refused> {
    load::relocate("/libbar.so", &library.image(), BASE, None, GIVEN)
}

#[test]
fn a_plain_function_library_is_loaded() {
    assert_eq!(check(&Library::new(ABI, &[])), Ok(()));
    let library = Library::new(ALONE, &["-nostdlib"]);
    let loaded = relocate(&library).unwrap();
    assert_eq!(loaded.segments[0].start, BASE);
    assert!(loaded.relro.is_some());
}

#[test]
fn an_export_that_is_no_plain_function_is_refused() {
    let refused = |source: &str, with: &[&str]| {
        let library = Library::new(source, with);
        match check(&library) {
            Err(Refused::UnusableExport { symbol, reason, .. }) => {
                assert_eq!(symbol, "faas_func_call");
                assert_eq!(load::export(&library.image(), "faas_func_call"), None);
                reason
            }
            other => panic!("{other:?}"),
        }
    };
    let rest = ABI.replace("faas_func_call", "other");
    let clones = "__attribute__((target_clones(\"avx2\", \"default\")))\
                  int faas_func_call(void) { return 0; }";
    assert!(refused(&format!("{rest}{clones}"), &[]).contains("indirect"));
    let absolute = "__asm__(\".globl faas_func_call\\nfaas_func_call = 0x1234\");";
    assert!(refused(&format!("{rest}{absolute}"), &[]).contains("absolute"));
    assert!(refused(&format!("{rest}int faas_func_call = 3;"), &[]).contains("not a function"));
    let table = "__asm__(\".globl faas_func_call\\n.data\\nfaas_func_call: .quad 1\\n.text\");";
    assert!(refused(&format!("{rest}{table}"), &[]).contains("not a function"));
    let old = "__asm__(\".symver old, faas_func_call@V1\"); int old(void) { return 0; }";
    let script = build::script("V1 { };");
    assert!(refused(&format!("{rest}{old}"), &[&script.1]).contains("hidden"));
}

#[test]
fn an_export_that_is_not_there_is_missing() {
    let hidden = ABI.replace(
        "int faas_func_call",
        "__attribute__((visibility(\"hidden\"))) int faas_func_call",
    );
    for source in [hidden, ABI.replace("faas_func_call", "other")] {
        let refused = check(&Library::new(&source, &[])).unwrap_err();
        assert_eq!(refused.code(), "missing-export", "{refused}");
    }
}

#[test]
fn a_function_written_in_assembly_is_one() {
    let rest = ABI.replace("faas_func_call", "other");
    let bare = "__asm__(\".globl faas_func_call\\nfaas_func_call: ret\");";
    assert_eq!(check(&Library::new(&format!("{rest}{bare}"), &[])), Ok(()));
}

#[test]
fn what_must_be_aligned_to_more_than_a_page_is_refused() {
    let library = Library::new(ABI, &["-Wl,-z,max-page-size=0x200000"]);
    let refused = check(&library).unwrap_err();
    assert_eq!(refused.code(), "alignment");
    assert!(refused.to_string().contains("2097152"), "{refused}");
}

#[test]
fn an_image_that_is_too_large_is_refused_before_it_is_made() {
    let large = "char large[300 << 20]; char *end = large + (300 << 20) - 8;";
    let library = Library::new(&format!("{ABI}{large}"), &[]);
    assert_eq!(check(&library).unwrap_err().code(), "image-too-large");
    assert_eq!(relocate(&library).unwrap_err().code(), "image-too-large");
}

#[test]
fn a_segment_of_zeros_alone_is_loaded() {
    let script = build::put(
        "zeros.ld",
        "PHDRS { text PT_LOAD FILEHDR PHDRS FLAGS(5); data PT_LOAD FLAGS(6);
                 zeros PT_LOAD FLAGS(6); dynamic PT_DYNAMIC FLAGS(6); stack PT_GNU_STACK FLAGS(6); }
         SECTIONS {
           /DISCARD/ : { *(.note*) *(.comment) *(.gnu.*) *(.eh_frame*) }
           . = SIZEOF_HEADERS;
           .hash : { *(.hash) } :text .dynsym : { *(.dynsym) } :text .dynstr : { *(.dynstr) } :text
           .rela.dyn : { *(.rela*) } :text .text : { *(.text*) *(.rodata*) } :text
           . = ALIGN(0x1000);
           .dynamic : { *(.dynamic) } :data :dynamic .got : { *(.got*) } :data .data : { *(.data*) } :data
           . = ALIGN(0x1000);
           .bss : { *(.bss*) } :zeros
         }",
    );
    let source = format!("{ALONE}static char zeros[20000]; char *end = zeros + 19999;");
    let library = Library::new(
        &source,
        &["-nostdlib", "-Wl,--hash-style=sysv", "-T", &script.1],
    );
    let last = *library.image().segments.last().unwrap();
    assert_eq!((last.file_size, last.writable()), (0, true));
    assert_eq!(check(&library), Ok(()));
    let loaded = relocate(&library).unwrap();
    let zeros = loaded.segments.last().unwrap();
    assert_eq!((zeros.len, zeros.bytes.as_slice()), (0x5000, &[][..]));
}

#[test]
fn a_relocation_of_zeros_writes_no_further_than_it_must() {
    let source = format!("{ALONE}static char zeros[20000]; char *end = zeros + 19999;");
    let library = Library::new(&source, &["-nostdlib"]);
    let mut image = library.image();
    let high = image.high();
    let at = |image: &mut nightgraft_patcher::elf::Image, offset| {
        image.dynamic.relocations[0].offset = offset;
    };
    at(&mut image, high - 8);
    let loaded = load::relocate("/libbar.so", &image, BASE, None, GIVEN).unwrap();
    let last = loaded.segments.last().unwrap();
    assert_eq!(last.bytes.len() as u64, last.len);
    for outside in [high - 7, high, u64::MAX - BASE - 3, u64::MAX - 3, 0] {
        at(&mut image, outside);
        let refused = load::relocate("/libbar.so", &image, BASE, None, GIVEN).unwrap_err();
        assert_eq!(refused.code(), "unsupported-relocation", "{outside:#x}");
    }
}

#[test]
fn only_pages_of_its_own_are_sealed() {
    let mut image = Library::new(ALONE, &["-nostdlib"]).image();
    let (start, len) = image.relro.unwrap();
    let text = image
        .segments
        .iter()
        .find(|s| s.executable())
        .unwrap()
        .vaddr;
    for range in [
        (start, len + 0x10_0000),
        (start.wrapping_sub(0x10_0000), 0x2000),
        (text, 0x1000),
        (u64::MAX - 0xfff, u64::MAX),
        (0, u64::MAX),
    ] {
        image.relro = Some(range);
        let refused = load::relocate("/libbar.so", &image, BASE, None, GIVEN).unwrap_err();
        assert_eq!(refused.code(), "broken-image", "{range:x?}");
    }
}

#[test]
fn numbers_that_no_linker_writes_are_survived() {
    let library = Library::new(ALONE, &["-nostdlib"]);
    let mut image = library.image();
    image.dynamic.init_array = Some((image.low(), u64::MAX));
    let refused = load::relocate("/libbar.so", &image, BASE, None, GIVEN).unwrap_err();
    assert_eq!(refused.code(), "broken-image");
    image.dynamic.init_array = Some((u64::MAX - 3, 64));
    assert!(load::relocate("/libbar.so", &image, BASE, None, GIVEN).is_err());
    assert!(
        load::relocate(
            "/libbar.so",
            &library.image(),
            u64::MAX & !0xfff,
            None,
            GIVEN
        )
        .is_err()
    );
}

/// Every byte of the headers and of the dynamic section, one after the other,
/// set to values that are likely to hurt.
#[test]
fn damaged_libraries_are_refused_or_loaded_but_survived() {
    let library = Library::new(ALONE, &["-nostdlib", "-Wl,-z,pack-relative-relocs"]);
    let (whole, image) = (library.bytes(), library.image());
    assert!(image.dynamic.relocations.iter().any(|r| r.addend.is_none()));
    let dynamic = image.dynamic_vaddr;
    let segment = image
        .segments
        .iter()
        .find(|s| (s.vaddr..s.vaddr + s.file_size).contains(&dynamic))
        .unwrap();
    let dynamic = (dynamic - segment.vaddr + segment.offset) as usize;
    let (mut loaded, mut refused) = (0, 0);
    for at in (0..0x600).chain(dynamic..dynamic + 0x140) {
        for value in [0, 1, 0x7f, 0x80, 0xff] {
            let mut bytes = whole.clone();
            bytes[at] = value;
            let Ok(image) = nightgraft_patcher::elf::Image::parse(bytes.into()) else {
                refused += 1;
                continue;
            };
            let _ = load::check("/libbar.so", &image);
            match load::relocate("/libbar.so", &image, BASE, None, GIVEN) {
                Ok(_) => loaded += 1,
                Err(_) => refused += 1,
            }
        }
    }
    assert!(loaded > 100 && refused > 100, "{loaded} {refused}");
}

#[test]
fn every_library_of_this_machine_is_read() {
    let mut read = 0;
    for folder in [
        "/usr/lib/x86_64-linux-gnu",
        "/lib/x86_64-linux-gnu",
        "/usr/lib64",
    ] {
        let Ok(entries) = std::fs::read_dir(folder) else {
            continue;
        };
        for path in entries.map(|e| e.unwrap().path()) {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            if !name.contains(".so") || !path.is_file() {
                continue;
            }
            let bytes = std::fs::read(&path).unwrap();
            if !bytes.starts_with(b"\x7fELF") {
                continue; // a linker script
            }
            let image = nightgraft_patcher::elf::Image::parse(bytes.into())
                .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            let span = image.high() - image.low();
            assert!(span > 0 && !image.dynamic.relocations.is_empty(), "{name}");
            let _ = load::check(&name, &image);
            read += 1;
        }
    }
    assert!(read > 10, "only {read} libraries found");
}
