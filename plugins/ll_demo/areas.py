"""Eight areas of the Python standard library, after the chapters of its reference manual.

Every release moves a few modules in and out; a module that is not here is left out of the data, and so are the
application IDLE (`idlelib`) and tests. Private modules stand with the public one that they implement.
"""

from __future__ import annotations

AREAS: dict[str, str] = {
    # Data Types; Numeric and Mathematical Modules; Functional Programming Modules
    "data types and numbers": """
        datetime _pydatetime calendar zoneinfo _strptime collections _collections_abc heapq bisect array weakref
        _weakrefset types copy pprint reprlib enum graphlib
        numbers decimal _pydecimal _pylong fractions random statistics functools itertools operator""",
    # Text Processing; Binary Data; File Formats; Internationalization; Structured Markup
    "text and markup": """
        string re sre_compile sre_constants sre_parse difflib textwrap stringprep rlcompleter codecs encodings
        csv configparser tomllib netrc plistlib xdrlib gettext locale
        html xml _markupbase""",
    # File and Directory Access; Data Persistence; Data Compression and Archiving; Cryptographic Services
    "files and persistence": """
        pathlib posixpath ntpath genericpath fileinput stat filecmp tempfile glob fnmatch linecache shutil
        pickle copyreg _compat_pickle shelve dbm sqlite3
        gzip bz2 lzma _compression compression zipfile tarfile hashlib hmac secrets""",
    # Generic Operating System; Concurrent Execution; Networking and Interprocess Communication; Unix
    "operating system and concurrency": """
        os io _pyio argparse optparse getopt logging getpass curses platform ctypes
        threading _threading_local multiprocessing concurrent subprocess sched queue contextvars
        asyncio asyncore asynchat socket ssl selectors signal pty tty pipes crypt""",
    # Internet Data Handling; Internet Protocols and Support
    "internet": """
        email json mailbox mailcap mimetypes base64 quopri uu binhex
        webbrowser wsgiref urllib nturl2path http ftplib poplib imaplib nntplib smtplib smtpd telnetlib uuid
        socketserver xmlrpc ipaddress cgi cgitb""",
    # Graphical User Interfaces with Tk; Program Frameworks; Multimedia
    "interfaces and multimedia": """
        tkinter turtle turtledemo cmd shlex
        wave aifc sunau chunk colorsys imghdr sndhdr""",
    # Development Tools; Debugging and Profiling; Software Packaging and Distribution
    "development tools": """
        typing pydoc doctest unittest lib2to3
        bdb pdb profile cProfile pstats timeit trace tracemalloc
        distutils ensurepip venv zipapp""",
    # Python Runtime Services; Custom Interpreters; Importing Modules; Language Services
    "runtime and language": """
        sysconfig _sysconfigdata _osx_support _aix_support warnings _py_warnings dataclasses contextlib abc _py_abc
        traceback inspect annotationlib site _sitebuiltins __future__ atexit code codeop
        importlib zipimport pkgutil modulefinder runpy imp
        ast symtable token tokenize keyword tabnanny pyclbr py_compile compileall dis opcode pickletools""",
}
"""Top-level modules and packages by area."""

AREA_NAMES = list(AREAS)
"""Areas by label."""

AREA_OF = {module: label for label, modules in enumerate(AREAS.values()) for module in modules.split()}
"""Label by top-level module or package."""
