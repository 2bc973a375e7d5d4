# One CMake target per component. `stellarium_component` is the only place where a component's
# dependencies are written down; test/style/check_includes.py reads the same calls and compares
# them with the #include lines of the sources, so a shortcut between layers fails a test.

find_package(Threads REQUIRED)
find_package(PkgConfig REQUIRED)
find_package(fmt REQUIRED)

add_library(stellarium_options INTERFACE)
target_compile_options(stellarium_options INTERFACE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wnon-virtual-dtor
    -Wold-style-cast -Wcast-align -Woverloaded-virtual>
  # Warnings are GCC's business; clang, which only builds the fuzz targets, has others. A build to
  # use stops at none: at -O3, GCC 12 takes appending to an empty vector for an overflow.
  $<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU>,$<NOT:$<CONFIG:Release>>>:-Werror>
  $<$<AND:$<COMPILE_LANG_AND_ID:CXX,GNU>,$<CONFIG:Release>>:-Wno-stringop-overflow>
  $<$<COMPILE_LANG_AND_ID:CXX,Clang>:-w>)
target_compile_definitions(stellarium_options INTERFACE _FILE_OFFSET_BITS=64 _GNU_SOURCE)
target_include_directories(stellarium_options INTERFACE ${CMAKE_SOURCE_DIR}/src)
if(CMAKE_UNITY_BUILD)
  # To the compiler each unity source is a header to the file that includes it.
  target_compile_options(stellarium_options INTERFACE
    $<$<COMPILE_LANG_AND_ID:CXX,GNU>:-Wno-subobject-linkage>)
endif()
if(STELLARIUM_SANITIZE)
  add_compile_options(-fsanitize=${STELLARIUM_SANITIZE} -fno-omit-frame-pointer
                      -fno-sanitize-recover=all
                      # A null pointer faults by itself; what the others find, ASan mostly finds too.
                      # Together they are a third of the time of the build.
                      -fno-sanitize=null,vptr,object-size,returns-nonnull-attribute
                      # GCC 12 warns of its own <regex> when it is instrumented.
                      -Wno-maybe-uninitialized)
  add_link_options(-fsanitize=${STELLARIUM_SANITIZE})
endif()

if(STELLARIUM_FUZZ)
  # Everything that a target reaches is instrumented, or libFuzzer is blind in it.
  add_compile_options(-fsanitize=fuzzer-no-link,address,undefined -fno-omit-frame-pointer
                      -fno-sanitize-recover=all)
  add_link_options(-fsanitize=address,undefined)
endif()

# stellarium_component(NAME <folder below src, '/' allowed>
#                      SOURCES a.cc b.cc
#                      DEPS <components whose headers may be included>
#                      LIBS <system libraries>)
function(stellarium_component)
  cmake_parse_arguments(ARG "" "NAME" "SOURCES;DEPS;LIBS" ${ARGN})
  string(REPLACE "/" "_" target "stellarium_${ARG_NAME}")
  add_library(${target} STATIC ${ARG_SOURCES})
  target_link_libraries(${target} PUBLIC stellarium_options fmt::fmt Threads::Threads)
  foreach(dep ${ARG_DEPS})
    string(REPLACE "/" "_" dep_target "stellarium_${dep}")
    target_link_libraries(${target} PUBLIC ${dep_target})
  endforeach()
  target_link_libraries(${target} PUBLIC ${ARG_LIBS})
endfunction()

# What is tested is in the libraries: checks for undefined behaviour in the tests' own code nearly
# double the time of their compilation.
function(stellarium_compile_test_fast target)
  if(STELLARIUM_SANITIZE MATCHES undefined)
    target_compile_options(${target} PRIVATE -fno-sanitize=undefined)
  endif()
endfunction()

# Sets `result` where the build leaves out tests with one of these labels (`make asan SKIP=...`).
function(stellarium_skips result)
  set(${result} FALSE PARENT_SCOPE)
  if(STELLARIUM_SKIP_LABELS)
    foreach(label ${ARGN})
      if(label MATCHES "^(${STELLARIUM_SKIP_LABELS})$")
        set(${result} TRUE PARENT_SCOPE)
      endif()
    endforeach()
  endif()
endfunction()

# stellarium_test(NAME nebula_store SOURCES store_test.cc DEPS nebula [LIBS ...] [TIMEOUT s]
#                 [LABELS unit|model|crash|system])
# One executable, one ctest entry for the whole executable (its own filter picks single cases).
function(stellarium_test)
  cmake_parse_arguments(ARG "" "NAME;TIMEOUT" "SOURCES;DEPS;LIBS;LABELS" ${ARGN})
  stellarium_skips(skipped ${ARG_LABELS})
  if(NOT STELLARIUM_TESTS OR skipped)
    return()
  endif()
  find_package(GTest REQUIRED)
  add_executable(${ARG_NAME}_test ${ARG_SOURCES})
  set_target_properties(${ARG_NAME}_test PROPERTIES UNITY_BUILD OFF)
  # A helper of the tests is included by its path from the top: "test/model/pool_shadow.h".
  target_include_directories(${ARG_NAME}_test PRIVATE ${CMAKE_SOURCE_DIR})
  foreach(dep ${ARG_DEPS})
    string(REPLACE "/" "_" dep_target "stellarium_${dep}")
    target_link_libraries(${ARG_NAME}_test PRIVATE ${dep_target})
  endforeach()
  target_link_libraries(${ARG_NAME}_test PRIVATE ${ARG_LIBS} GTest::gtest GTest::gtest_main)
  stellarium_compile_test_fast(${ARG_NAME}_test)
  add_test(NAME ${ARG_NAME} COMMAND ${ARG_NAME}_test --gtest_brief=1)
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  if(STELLARIUM_SANITIZE)
    math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 10")  # Instrumented code is ten times as slow.
  endif()
  if(NOT ARG_LABELS)
    set(ARG_LABELS unit)
  endif()
  set_tests_properties(${ARG_NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS "${ARG_LABELS}")
endfunction()

# stellarium_add_fuzz_target(NAME nebula_format SOURCES nebula_format_fuzz.cc DEPS nebula base
#                            RUNS 20000 [LIBS ...] [TIMEOUT s])
# One function LLVMFuzzerTestOneInput, linked twice: with libFuzzer where STELLARIUM_FUZZ is on (the
# executable NAME_fuzz), and else with a driver of ours as the test fuzz_NAME, which runs the inputs
# kept in test/fuzz/corpus/NAME_fuzz and RUNS mutations of them.
function(stellarium_add_fuzz_target)
  cmake_parse_arguments(ARG "" "NAME;RUNS;TIMEOUT" "SOURCES;DEPS;LIBS" ${ARGN})
  stellarium_skips(skipped fuzz)
  if(STELLARIUM_FUZZ)
    set(executable ${ARG_NAME}_fuzz)
    add_executable(${executable} ${ARG_SOURCES})
    target_link_options(${executable} PRIVATE -fsanitize=fuzzer)
  elseif(STELLARIUM_TESTS AND NOT skipped)
    set(executable ${ARG_NAME}_fuzz_replay)
    add_executable(${executable} ${ARG_SOURCES})
    target_link_libraries(${executable} PRIVATE fuzz_replay)
    stellarium_compile_test_fast(${executable})
    add_test(NAME fuzz_${ARG_NAME}
             COMMAND ${executable} ${CMAKE_SOURCE_DIR}/test/fuzz/corpus/${ARG_NAME}_fuzz ${ARG_RUNS})
    if(NOT ARG_TIMEOUT)
      set(ARG_TIMEOUT 120)
    endif()
    if(STELLARIUM_SANITIZE)
      math(EXPR ARG_TIMEOUT "${ARG_TIMEOUT} * 10")
    endif()
    set_tests_properties(fuzz_${ARG_NAME} PROPERTIES TIMEOUT ${ARG_TIMEOUT} LABELS fuzz)
  else()
    return()
  endif()
  target_include_directories(${executable} PRIVATE ${CMAKE_SOURCE_DIR})
  foreach(dep ${ARG_DEPS})
    string(REPLACE "/" "_" dep_target "stellarium_${dep}")
    target_link_libraries(${executable} PRIVATE ${dep_target})
  endforeach()
  target_link_libraries(${executable} PRIVATE ${ARG_LIBS})
endfunction()
