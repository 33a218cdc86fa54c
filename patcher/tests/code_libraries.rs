//! Real libraries with every call through a pointer and every tail jump led
//! through a stub: they do what they did.

#![expect(
    non_snake_case,
    reason = "functions of libraries are called by their names"
)]

#[expect(dead_code, reason = "other tests use the rest")]
#[path = "code/live.rs"]
mod live;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_ulong, c_void};
use std::path::Path;

use live::{Counter, STUB, counting, island_near, lead, original, write_all};
use nightgraft_patcher::code::{Window, analyse};

/// A library in this process, which nobody else uses here.
struct Library {
    handle: *mut c_void,
    bias: u64,
    windows: Vec<(Window, Box<Counter>)>,
}

impl Library {
    /// `None` if the machine has none of this name.
    fn load(name: &str, symbol: &CStr) -> Option<Library> {
        let folders = ["/usr/lib/x86_64-linux-gnu", "/lib/x86_64-linux-gnu"];
        let paths = folders.map(|folder| Path::new(folder).join(name));
        let path = paths.into_iter().find(|path| path.is_file())?;
        let file = std::fs::read(&path).expect("a file");
        let path = CString::new(path.to_str().expect("UTF-8")).expect("no NUL");
        // SAFETY: the library's initialisers do nothing to others.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        assert!(!handle.is_null(), "{name} can't be loaded");
        let mut library = Library {
            handle,
            bias: 0,
            windows: Vec::new(),
        };
        // SAFETY: `info` is valid for writes.
        unsafe {
            let mut info: libc::Dl_info = std::mem::zeroed();
            let at = library.address(symbol);
            assert_ne!(libc::dladdr(at, &raw mut info), 0);
            library.bias = info.dli_fbase as u64;
        }
        let mut taken: Vec<(u64, u64)> = Vec::new();
        for (.., window) in analyse(&file).expect("a library").survey() {
            let Ok(window) = window else { continue };
            let ranges: Vec<(u64, u64)> = original(&window, 0)
                .iter()
                .map(|(at, bytes)| (*at, at + bytes.len() as u64))
                .collect();
            let free =
                |(start, end): &(u64, u64)| taken.iter().all(|(s, e)| e <= start || end <= s);
            if ranges.iter().all(free) {
                taken.extend(ranges);
                library.windows.push((window, Box::new(0)));
            }
        }
        Some(library)
    }

    fn address(&self, symbol: &CStr) -> *const c_void {
        // SAFETY: the handle is open.
        let at = unsafe { libc::dlsym(self.handle, symbol.as_ptr()) };
        assert!(!at.is_null(), "{symbol:?} is missing");
        at
    }

    fn patch(&self) {
        let size = self.windows.len() as u64 * STUB;
        let island = island_near(self.bias, size.next_multiple_of(4096));
        let mut at = island;
        for (window, counter) in &self.windows {
            write_all(&lead(window, self.bias, at, &counting(counter)).expect("a stub"));
            at += STUB;
        }
    }

    fn revert(&self) {
        for (window, _) in &self.windows {
            write_all(&original(window, self.bias));
        }
    }

    /// Windows that were passed, and how often, by kind.
    fn passed(&self) -> BTreeMap<String, (usize, u64)> {
        let mut kinds = BTreeMap::new();
        for (window, counter) in &self.windows {
            // SAFETY: the box is alive; the stub writes it.
            let count = unsafe { std::ptr::from_ref(&**counter).read_volatile() };
            let filler = if window.hop.is_some() {
                " through filler"
            } else {
                ""
            };
            let entry = kinds.entry(format!("{:?}{filler}", window.kind));
            let kind: &mut (usize, u64) = entry.or_default();
            kind.0 += usize::from(count > 0);
            kind.1 += count;
        }
        kinds
    }
}

/// The function `$name` of a library, as this type.
macro_rules! function {
    ($library:expr, $name:ident: $type:ty) => {
        // SAFETY: the library documents this type.
        let $name: $type = unsafe {
            let name = CString::new(stringify!($name)).expect("no NUL");
            std::mem::transmute::<*const c_void, $type>($library.address(&name))
        };
    };
}

const SQL: &str = "
create table t (a integer primary key, b text, c real);
with recursive n(i) as (select 1 union all select i + 1 from n where i < 2000)
    insert into t select i, printf('%05d-%s', i * 7919 % 2003, hex(i * i)), i * 0.37 from n;
create index x on t (b);
create view v as select a % 10 as k, count(*) as n, group_concat(substr(b, 1, 3)) as s from t group by k;
select count(*), sum(c), min(b), max(b) from (select * from t order by b limit 50);
select b, upper(b), length(b), abs(-a), round(c, 1), replace(b, '-', '+'), trim(b, '0') from t
    where b like '0%1' or b glob '*F' order by c desc limit 20;
select a, sum(c) over (order by a rows 3 preceding), rank() over (order by b) from t limit 10;
select json_extract('{\"x\": [1, 2, {\"y\": 3}]}', '$.x[2].y'), json_array(1, 'b', null);
begin; update t set c = c * 2 where a % 3 = 0; delete from t where a % 5 = 0; rollback;
delete from t where a % 7 = 0;
select * from v;
select strftime('%Y-%m-%d %H', 86400 * a, 'unixepoch') from t limit 5;
explain query plan select * from t join v on k = a where b > '00500' order by s;
select t1.a, t2.b from t t1 join t t2 on t1.a = t2.a + 1 where t1.b > t2.b collate nocase limit 9;
pragma integrity_check;
vacuum;
select total(c), avg(a), quote(x'00ff'), typeof(c), likely(1) from t;
select nonsense from t;
";

extern "C" fn row(
    to: *mut c_void,
    columns: c_int,
    texts: *mut *mut c_char,
    _: *mut *mut c_char,
) -> c_int {
    // SAFETY: sqlite3_exec passes `to` and so many strings.
    unsafe {
        let out = &mut *to.cast::<Vec<u8>>();
        for index in 0..columns as usize {
            let text = *texts.add(index);
            if !text.is_null() {
                out.extend(CStr::from_ptr(text).to_bytes());
            }
            out.push(b'|');
        }
        out.push(b'\n');
    }
    0
}

fn sqlite(library: &Library) -> Vec<u8> {
    function!(library, sqlite3_open: extern "C" fn(*const c_char, *mut *mut c_void) -> c_int);
    function!(library, sqlite3_close: extern "C" fn(*mut c_void) -> c_int);
    function!(library, sqlite3_errmsg: extern "C" fn(*mut c_void) -> *const c_char);
    function!(library, sqlite3_exec: extern "C" fn(
        *mut c_void,
        *const c_char,
        extern "C" fn(*mut c_void, c_int, *mut *mut c_char, *mut *mut c_char) -> c_int,
        *mut c_void,
        *mut *mut c_char,
    ) -> c_int);
    let mut out: Vec<u8> = Vec::new();
    let mut database = std::ptr::null_mut();
    assert_eq!(sqlite3_open(c":memory:".as_ptr(), &raw mut database), 0);
    let sql = CString::new(SQL).expect("no NUL");
    let to = (&raw mut out).cast();
    let code = sqlite3_exec(database, sql.as_ptr(), row, to, std::ptr::null_mut());
    // SAFETY: a string of the library's.
    let message = unsafe { CStr::from_ptr(sqlite3_errmsg(database)) };
    out.extend(format!("{code} {message:?}").bytes());
    assert_eq!(sqlite3_close(database), 0);
    out
}

fn zlib(library: &Library) -> Vec<u8> {
    function!(library, compress2: extern "C" fn(*mut u8, *mut c_ulong, *const u8, c_ulong, c_int) -> c_int);
    function!(library, uncompress: extern "C" fn(*mut u8, *mut c_ulong, *const u8, c_ulong) -> c_int);
    function!(library, crc32: extern "C" fn(c_ulong, *const u8, u32) -> c_ulong);
    let text = SQL.repeat(9).into_bytes();
    let mut all = Vec::new();
    for level in 0..=9 {
        let mut packed = vec![0; text.len() + 1000];
        let mut length = packed.len() as c_ulong;
        let (to, from) = (packed.as_mut_ptr(), text.as_ptr());
        assert_eq!(
            compress2(to, &raw mut length, from, text.len() as c_ulong, level),
            0
        );
        all.extend(&packed[..length as usize]);
        let mut back = vec![0; text.len()];
        let mut whole = back.len() as c_ulong;
        assert_eq!(uncompress(back.as_mut_ptr(), &raw mut whole, to, length), 0);
        assert_eq!(back, text);
    }
    let sum = crc32(0, all.as_ptr(), all.len() as u32);
    all.extend(sum.to_le_bytes());
    all
}

const XML: &str = "<?xml version='1.0' encoding='ISO-8859-1'?>
<!DOCTYPE a [<!ENTITY e 'entity &#228;'><!ELEMENT a ANY><!ATTLIST b c CDATA 'default'>]>
<a xmlns:n='urn:n'><b c='1'>text &e;</b><n:b/><![CDATA[<raw>]]><!-- comment --><?pi do?>
<b><c/><c d='2'>x</c><c>y &amp; z</c></b></a>";

fn xml(library: &Library) -> Vec<u8> {
    type Read =
        extern "C" fn(*const c_char, c_int, *const c_char, *const c_char, c_int) -> *mut c_void;
    type Dump = extern "C" fn(*mut c_void, *mut *mut c_char, *mut c_int);
    function!(library, xmlReadMemory: Read);
    function!(library, htmlReadMemory: Read);
    function!(library, xmlDocDumpMemory: Dump);
    function!(library, htmlDocDumpMemory: Dump);
    function!(library, xmlFreeDoc: extern "C" fn(*mut c_void));
    function!(library, xmlXPathNewContext: extern "C" fn(*mut c_void) -> *mut c_void);
    function!(library, xmlXPathFreeContext: extern "C" fn(*mut c_void));
    function!(library, xmlXPathEvalExpression: extern "C" fn(*const c_char, *mut c_void) -> *mut c_void);
    function!(library, xmlXPathCastToString: extern "C" fn(*mut c_void) -> *mut c_char);
    function!(library, xmlXPathFreeObject: extern "C" fn(*mut c_void));
    let mut out = Vec::new();
    let mut dump = |dump: Dump, document: *mut c_void| {
        let (mut text, mut length) = (std::ptr::null_mut(), 0);
        dump(document, &raw mut text, &raw mut length);
        assert!(!text.is_null());
        // SAFETY: so many bytes of the library's, which may stay.
        out.extend(unsafe { std::slice::from_raw_parts(text.cast::<u8>(), length as usize) });
    };
    // XML_PARSE_NOENT | XML_PARSE_DTDATTR | XML_PARSE_NOERROR | XML_PARSE_NOWARNING
    let options = 2 | 8 | 32 | 64;
    let null = std::ptr::null();
    let text = |text: &str| (text.as_ptr().cast::<c_char>(), text.len() as c_int);
    let (at, length) = text(XML);
    let document = xmlReadMemory(at, length, null, null, options);
    assert!(!document.is_null());
    dump(xmlDocDumpMemory, document);
    let html = "<html><p class=x>one<br>two<table><tr><td>&uuml;<script>a < b</script>";
    let (at, length) = text(html);
    let page = htmlReadMemory(at, length, null, null, 1 | options);
    assert!(!page.is_null());
    dump(htmlDocDumpMemory, page);
    xmlFreeDoc(page);
    let context = xmlXPathNewContext(document);
    for query in [
        c"count(//c)",
        c"string(//c[last()])",
        c"concat(name(/a/*[1]), '-', sum(//@c | //@d), translate('abc', 'b', 'x'))",
        c"/a/b[c and not(@c)]/c[contains(., 'y')]",
        c"normalize-space(//b[1]) = substring-before('text !', '!')",
    ] {
        let found = xmlXPathEvalExpression(query.as_ptr(), context);
        assert!(!found.is_null(), "{query:?}");
        // SAFETY: a string of the library's.
        out.extend(unsafe { CStr::from_ptr(xmlXPathCastToString(found)) }.to_bytes());
        xmlXPathFreeObject(found);
    }
    xmlXPathFreeContext(context);
    xmlFreeDoc(document);
    out
}

fn pcre(library: &Library) -> Vec<u8> {
    function!(library, pcre2_compile_8: extern "C" fn(
        *const u8,
        usize,
        u32,
        *mut c_int,
        *mut usize,
        *mut c_void,
    ) -> *mut c_void);
    function!(library, pcre2_match_data_create_from_pattern_8: extern "C" fn(*mut c_void, *mut c_void) -> *mut c_void);
    function!(library, pcre2_get_ovector_pointer_8: extern "C" fn(*mut c_void) -> *const usize);
    function!(library, pcre2_match_8: extern "C" fn(
        *mut c_void,
        *const u8,
        usize,
        usize,
        u32,
        *mut c_void,
        *mut c_void,
    ) -> c_int);
    function!(library, pcre2_code_free_8: extern "C" fn(*mut c_void));
    function!(library, pcre2_match_data_free_8: extern "C" fn(*mut c_void));
    let mut out = String::new();
    for pattern in [
        r"(\w+)\s*=\s*(?<value>\d+|'[^']*')",
        r"(?i)select(?:(?!from).)*from\s+(\w)",
        r"((a|b(?=c)|[^\x00-\x20]{3,7}?)+)\1",
        r"(?<!\d)(\d{2,})(?!\d).*\R",
    ] {
        let (mut error, mut offset) = (0, 0);
        let null = std::ptr::null_mut();
        let (at, length) = (pattern.as_ptr(), pattern.len());
        let code = pcre2_compile_8(at, length, 0, &raw mut error, &raw mut offset, null);
        assert!(!code.is_null(), "{pattern}: {error}");
        let data = pcre2_match_data_create_from_pattern_8(code, null);
        let mut from = 0;
        for _ in 0..20 {
            let count = pcre2_match_8(code, SQL.as_ptr(), SQL.len(), from, 0, data, null);
            if count < 1 {
                break;
            }
            // SAFETY: two numbers for each group.
            let spans = unsafe {
                std::slice::from_raw_parts(pcre2_get_ovector_pointer_8(data), count as usize * 2)
            };
            out += &format!("{spans:?}");
            from = spans[1].max(from + 1);
        }
        pcre2_match_data_free_8(data);
        pcre2_code_free_8(code);
    }
    out.into_bytes()
}

#[test]
fn libraries_do_what_they_did_with_all_their_calls_led_through_stubs() {
    type Work = fn(&Library) -> Vec<u8>;
    let all: [(&str, &CStr, Work); 4] = [
        ("libsqlite3.so.0", c"sqlite3_open", sqlite),
        ("libz.so.1", c"compress2", zlib),
        ("libxml2.so.2", c"xmlReadMemory", xml),
        ("libpcre2-8.so.0", c"pcre2_compile_8", pcre),
    ];
    let mut kinds: BTreeMap<String, (usize, u64)> = BTreeMap::new();
    for (name, symbol, work) in all {
        let library = Library::load(name, symbol).unwrap_or_else(|| panic!("{name} is missing"));
        let expected = work(&library);
        assert!(
            expected.len() > 100,
            "{}",
            String::from_utf8_lossy(&expected)
        );
        assert_eq!(work(&library), expected, "{name}: the same each time");
        library.patch();
        let patched = work(&library);
        library.revert();
        assert!(
            patched == expected,
            "{name}: {}",
            String::from_utf8_lossy(&patched)
        );
        let passed = library.passed();
        println!("{name}: {} windows, {passed:?}", library.windows.len());
        assert!(work(&library) == expected, "{name}: reverted");
        assert_eq!(library.passed(), passed, "{name}: reverted");
        for (kind, (windows, calls)) in passed {
            let all = kinds.entry(kind).or_default();
            *all = (all.0 + windows, all.1 + calls);
        }
    }
    println!("{kinds:?}");
    for kind in ["Call", "Jump", "JumpedCall", "JumpedCall through filler"] {
        assert!(
            kinds.get(kind).is_some_and(|(windows, _)| *windows > 0),
            "{kind}: {kinds:?}"
        );
    }
}
